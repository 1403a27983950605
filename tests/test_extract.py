"""Extraction: what is read, what is written, what an error leaves behind."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import small_engine
from extracting import Wrapped, index, scaled, touch
from pictures import photograph
from pyarrow import parquet
from scenes import write_photographs

from stellar_fast import StellarError, extract
from stellar_fast.extract import discover, plan, run
from stellar_fast.images import load_image


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, good=20, broken=4)
    return root


def paths(items) -> list[str]:
    return [item.path for item in items]


# What is read


def test_a_folder_is_read_recursively_sorted_by_path_and_known_suffixes_only(tmp_path):
    names = ("b.jpg", "a/z.PNG", "a/c/y.webp", "a.tiff")
    touch(tmp_path, *names, "notes.txt", "a/x.npy", ".hidden.jpg", ".cache/x.jpg", "a/.DS_Store")
    items = discover(tmp_path)
    assert paths(items) == ["a.tiff", "a/c/y.webp", "a/z.PNG", "b.jpg"]
    assert all(Path(item.file).is_file() for item in items)


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    touch(tmp_path, "in/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in")
    assert paths(discover(tmp_path / "in")) == ["a.jpg", "linked/b.jpg"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        discover(tmp_path)


def test_a_list_keeps_its_order_and_counts_paths_from_its_own_folder(tmp_path):
    touch(tmp_path, "lists/b.jpg", "a.dat")
    source = tmp_path / "lists" / "all.txt"
    absolute = str(tmp_path / "lists" / "c.png")
    source.write_bytes(f"\ufeffb.jpg\r\n\n../a.dat\n{absolute}\nmissing one.jpg".encode())
    items = discover(source)
    assert paths(items) == ["b.jpg", "../a.dat", absolute, "missing one.jpg"]
    assert [item.file for item in items] == [
        str(tmp_path / "lists" / "b.jpg"),
        str(tmp_path / "a.dat"),
        absolute,
        str(tmp_path / "lists" / "missing one.jpg"),
    ]


def test_a_file_listed_twice_is_an_error_that_names_both_lines(tmp_path):
    source = tmp_path / "list.txt"
    source.write_text("a.jpg\nb.jpg\n\n./sub/../a.jpg\n")
    with pytest.raises(ValueError, match=r"lines 1 and 4 .*a\.jpg"):
        discover(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder or list"),
        (lambda path: path.mkdir(), "no images in this folder"),
        (lambda path: path.write_text(""), "neither"),
    ],
)
def test_inputs_that_cannot_be(tmp_path, make, message):
    make(tmp_path / "input")
    with pytest.raises(ValueError, match=message):
        discover(tmp_path / "input")


def test_an_empty_list_and_a_binary_one_are_errors(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="names no images"):
        discover(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="zero byte"):
        discover(tmp_path / "binary.txt")


def test_names_that_are_no_utf8_are_read_and_indexed(tmp_path, engine):
    photograph(50, 50).save(tmp_path / "a.png")
    os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xe9.png")
    run(plan(tmp_path, tmp_path / "out"), engine)
    assert index(tmp_path / "out")["path"] == ["\\xe9.png"]
    assert index(tmp_path / "out")["status"] == ["ok"]


# What is written


@pytest.mark.parametrize("preset", ["card", "eval"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_the_engines_features_of_the_good_images_in_order(
    photographs, tmp_path, engine, preset, dtype
):
    features = ("cls", "sparse", "spatial", "dense")
    job = plan(
        photographs, tmp_path / "out", features=features, dtype=dtype, preset=preset, batch_size=7
    )
    summary = run(job, engine)
    table = index(tmp_path / "out")
    good = [
        item.file for item, status in zip(job.items, table["status"], strict=True) if status == "ok"
    ]
    pixels = torch.stack([load_image(file, preset) for file in good])
    # In the same batches, so that the comparison can be exact.
    parts = [engine.encode(part, check_range=False) for part in pixels.split(7)]
    for name in features:
        stored = np.load(tmp_path / "out" / f"{name}.npy", mmap_mode="r")
        assert stored.dtype == dtype
        expected = torch.cat([part[name] for part in parts]).numpy().astype(dtype)
        np.testing.assert_array_equal(stored, expected)
    assert (summary.images, summary.rows, summary.failed) == (24, 20, 4)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_the_index_and_the_run_say_what_was_done(photographs, tmp_path, engine):
    job = plan(photographs, tmp_path / "out")
    run(job, engine, facts={"repo": "somewhere"})
    table = parquet.read_table(tmp_path / "out" / "index.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("path", "string"),
        ("row", "int64"),
        ("status", "string"),
        ("reason", "string"),
    ]
    lines = table.to_pylist()
    assert [line["path"] for line in lines] == paths(job.items)
    good = [line for line in lines if line["status"] == "ok"]
    failed = [line for line in lines if line["status"] == "failed"]
    assert [line["row"] for line in good] == list(range(20))
    assert all(line["reason"] is None for line in good)
    assert len(failed) == 4
    assert all(line["row"] is None and line["reason"] for line in failed)
    assert all("broken" in line["path"] for line in failed)

    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["features"] == {
        "sparse": {"shape": [20, 8, 64], "dtype": "float32"},
        "cls": {"shape": [20, 1, 64], "dtype": "float32"},
    }
    expected = {"model": "golden", "weights": "recipe", "precision": "fp32", "preset": "card"}
    assert expected.items() <= facts.items()
    assert (facts["images"], facts["rows"], facts["failed"]) == (24, 20, 4)
    assert facts["repo"] == "somewhere"
    assert set(facts["seconds"]) == {"decode", "wait", "encode", "write", "total"}
    assert facts["versions"]["torch"] == torch.__version__


def test_a_listed_file_that_is_not_there_is_a_failed_row(tmp_path, engine):
    photograph(50, 50).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("gone.jpg\na.png\n")
    run(plan(tmp_path / "list.txt", tmp_path / "out"), engine)
    table = index(tmp_path / "out")
    assert table["reason"] == ["no such file", None]
    assert table["row"] == [None, 0]


def test_all_images_broken_is_an_output_without_rows(tmp_path, engine):
    touch(tmp_path / "in", "a.jpg", "b.jpg")
    summary = run(plan(tmp_path / "in", tmp_path / "out"), engine)
    assert (summary.rows, summary.failed) == (0, 2)
    assert np.load(tmp_path / "out" / "sparse.npy").shape == (0, 8, 64)
    assert index(tmp_path / "out")["row"] == [None, None]


@pytest.mark.parametrize("batch_size", [1, 3, 20, 100])
def test_batches_hold_only_good_images_and_are_full(photographs, tmp_path, engine, batch_size):
    sizes = []

    def encode(images, **arguments):
        sizes.append(len(images))
        return engine.encode(images, **arguments)

    run(plan(photographs, tmp_path / "out", batch_size=batch_size), Wrapped(engine, encode))
    full, rest = divmod(20, batch_size)
    assert [size for size in sizes if size] == [batch_size] * full + [rest] * (rest > 0)


def test_only_the_eval_preset_takes_values_beyond_the_range(photographs, tmp_path, engine):
    checks = []

    def encode(images, **arguments):
        if len(images):
            checks.append(arguments["check_range"])
        return engine.encode(images, **arguments)

    for preset in ("card", "eval"):
        run(
            plan(photographs, tmp_path / preset, preset=preset, batch_size=20),
            Wrapped(engine, encode),
        )
    assert checks == [True, False]


def test_no_more_images_are_decoded_than_the_queue_holds(
    photographs, tmp_path, engine, monkeypatch
):
    started = []
    load = extract.runner.load_image
    monkeypatch.setattr(extract.runner, "load_image", lambda *a: (started.append(a), load(*a))[1])
    counts = []

    def encode(images, **arguments):
        if len(images):
            if not counts:
                time.sleep(0.5)  # the worker would go on, if the queue had room
            counts.append(len(started))
        return engine.encode(images, **arguments)

    run(plan(photographs, tmp_path / "out", batch_size=2, workers=1), Wrapped(engine, encode))
    # Taken: 2 good images, and broken ones among them. Ahead: 2 batches and 1 for the worker.
    assert counts[0] <= 2 + 4 + 2 * 2 + 1
    assert counts[-1] == 24


# Numbers that do not fit


def test_float16_overflow_is_an_error_that_says_float32(photographs, tmp_path, engine):
    with pytest.raises(StellarError, match=r"beyond the largest float16.*--dtype float32"):
        run(plan(photographs, tmp_path / "out", dtype="float16"), scaled(engine, 1e6))
    assert os.listdir(tmp_path) == []
    run(plan(photographs, tmp_path / "out", dtype="float32"), scaled(engine, 1e6))


def test_nan_from_the_model_is_an_error_and_not_a_row(photographs, tmp_path, engine):
    with pytest.raises(StellarError, match="NaN or infinity in sparse"):
        run(plan(photographs, tmp_path / "out", dtype="float32"), scaled(engine, float("nan")))
    assert os.listdir(tmp_path) == []


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ("sparse", "lowrank")}, "spatial @ sparse"),
        ({"features": ("sparse", "dance")}, "dance"),
        ({"features": ()}, "none"),
        ({"dtype": "bfloat16"}, "float32, float16"),
        ({"preset": "crop"}, "card, eval"),
        ({"batch_size": 0}, "batch size"),
        ({"workers": 0}, "worker"),
    ],
)
def test_arguments_that_cannot_be(photographs, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(photographs, tmp_path / "out", **arguments)


def test_an_output_that_holds_the_input_is_refused(tmp_path):
    touch(tmp_path, "out/photographs/a.jpg")
    with pytest.raises(ValueError, match="holds the input"):
        plan(tmp_path / "out" / "photographs", tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match="holds the input"):
        plan(tmp_path / "out", tmp_path / "out", overwrite=True)
