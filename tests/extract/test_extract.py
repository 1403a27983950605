"""Extraction: what is written, and what the options do."""

import json
import os
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from extracting import Wrapped, contents, feature, index, parts, scaled, touch
from pictures import photograph
from pyarrow import parquet
from scenes import write_photographs

from stellar_fast import StellarError
from stellar_fast.extract import make_job, run, stats
from stellar_fast.extract.output.formats import FORMATS
from stellar_fast.extract.output.layout import check_sums, read_plan
from stellar_fast.extract.stats import Progress
from stellar_fast.extract.work.workers import Workers
from stellar_fast.images.presets import load_batch, load_image


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"), good=20, broken=4)


pytestmark = pytest.mark.usefixtures("one_decoding_process")


def expected(engine, job, good, batches, preset="card"):
    """`encode` of the good images in the same batches, so that a comparison can be exact."""
    files = {item.id: item.file for item in job.items}
    pixels = torch.stack([load_image(files[name], preset) for name in good])
    found = [engine.encode(part) for part in pixels.split(batches)]
    return {name: torch.cat([part[name] for part in found]).numpy() for name in found[0]}


@pytest.mark.parametrize(("preset", "dtype"), [("card", "float16"), ("eval", "float32")])
def test_rows_are_the_engines_features_of_the_good_images_in_order(
    photographs, tmp_path, engine, preset, dtype
):
    features = ("cls", "sparse", "spatial", "dense")
    arguments = {"features": features, "dtype": dtype, "preset": preset, "batch_size": 7}
    # For "eval" a decoding process imports torch, which takes seconds.
    job = make_job(photographs, tmp_path / "out", workers=1 if preset == "eval" else 2, **arguments)
    summary = run(job, engine)
    table = index(tmp_path / "out")
    rows = zip(table["id"], table["status"], strict=True)
    good = [name for name, status in rows if status == "ok"]
    wanted = expected(engine, job, good, 7, preset)
    for name in features:
        stored = np.load(parts(tmp_path / "out")[0] / f"{name}.npy", mmap_mode="r")
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored, wanted[name].astype(dtype))
    assert (summary.images, summary.rows, summary.failed) == (24, 20, 4)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_scaled_decode_is_of_the_plan_and_the_index_has_the_size_in_the_file(tmp_path, engine):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    photograph(1856, 1024, seed=1).save(source / "large.jpg")
    photograph(60, 50, seed=2).save(source / "small.jpg")
    run(make_job(source, output, scaled_decode=True), engine)
    table = index(output)
    assert (table["width"], table["height"]) == ([1856, 60], [1024, 50])
    files = [source / name for name in table["id"]]
    pixels = load_batch(files, "card", scaled_decode=True)
    stored = np.load(parts(output)[0] / "cls.npy")
    np.testing.assert_array_equal(stored, engine.encode(pixels)["cls"].numpy())
    assert not np.array_equal(stored, engine.encode(load_batch(files, "card"))["cls"].numpy())
    assert read_plan(output).configuration["scaled_decode"] is True
    with pytest.raises(ValueError, match=r"scaled_decode \(true -> false\)"):
        run(make_job(source, output), engine)
    with pytest.raises(ValueError, match="'eval' reads single pixels"):
        make_job(source, tmp_path / "other", scaled_decode=True, preset="eval")


def test_partitions_hold_all_images_in_order_and_batches_do_not_cross_them(
    photographs, tmp_path, engine
):
    sizes = []

    def encode(images, **arguments):
        sizes.append(len(images))
        return engine.encode(images, **arguments)

    job = make_job(photographs, tmp_path / "out", partition_size=10, batch_size=4, workers=2)
    run(job, Wrapped(engine, encode))
    plan = read_plan(tmp_path / "out")
    assert [part.images for part in plan.partitions] == [10, 10, 4]
    table = index(tmp_path / "out")
    assert table["id"] == [item.id for item in job.items]
    start, batches = 0, []
    for number, part in enumerate(parts(tmp_path / "out")):
        stop = start + plan.partitions[number].images
        rows = [row for row in table["row"][start:stop] if row is not None]
        assert rows == list(range(len(rows)))
        good = [
            name
            for name, row in zip(table["id"][start:stop], table["row"][start:stop], strict=True)
            if row is not None
        ]
        np.testing.assert_array_equal(
            np.load(part / "sparse.npy"), expected(engine, job, good, 4)["sparse"]
        )
        full, rest = divmod(len(rows), 4)
        batches += [4] * full + [rest] * (rest > 0)
        start = stop
        check_sums(tmp_path / "out", plan, number)
    assert [size for size in sizes if size] == batches


def test_the_index_the_manifest_and_the_plan_say_what_was_done(photographs, tmp_path, engine):
    output = tmp_path / "out"
    job = make_job(photographs, output)
    summary = run(job, engine, facts={"repo": "somewhere"})
    table = parquet.read_table(output / "part-00000" / "index.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        *(("id", "string"), ("row", "int64"), ("status", "string"), ("reason", "string")),
        *(("width", "int32"), ("height", "int32")),
    ]
    lines = table.to_pylist()
    assert [line["id"] for line in lines] == [item.id for item in job.items]
    good = [line for line in lines if line["status"] == "ok"]
    failed = [line for line in lines if line["status"] == "failed"]
    assert [line["row"] for line in good] == list(range(20))
    assert all(line["reason"] is None and 60 <= line["width"] < 400 for line in good)
    assert len(failed) == 4
    for line in failed:
        assert line["row"] is line["width"] is line["height"] is None
        assert line["reason"]
        assert "broken" in line["id"]

    manifest = json.loads((output / "part-00000" / "manifest.json").read_text())
    assert manifest["features"] == {
        "sparse": {"shape": [20, 8, 64], "dtype": "float32"},
        "cls": {"shape": [20, 1, 64], "dtype": "float32"},
    }
    assert (manifest["images"], manifest["rows"], manifest["failed"]) == (24, 20, 4)
    assert set(manifest["files"]) == {"sparse.npy", "cls.npy", "index.parquet"}
    assert manifest["made"]["versions"]["torch"] == metadata.version("torch")
    plan = read_plan(output)
    told = {"weights": "recipe", "precision": "fp32", "preset": "card", "dtype": "float32"}
    assert told.items() <= plan.configuration.items()
    assert plan.configuration["model"]["backbone"]["hidden_size"] == 64
    assert plan.configuration["batch_size"] == engine.max_batch
    assert plan.facts == {"repo": "somewhere", "backend": engine.backend}
    stats = json.loads((output / "stats.json").read_text())
    assert (stats["outcome"], stats["images"], stats["failed"]) == ("complete", 24, 4)
    stages = {"read", "decode", "wait", "encode", "blocked", "write", "total"}
    assert set(stats["seconds"]) == stages
    assert 0 < summary.seconds["read"] != summary.seconds["decode"] > 0
    assert stats["limit"] in ("read", "decode", "encode", "write")


def test_sizes_are_the_upright_pictures_and_names_may_be_no_utf8(tmp_path, engine):
    turned = photograph(50, 30)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=turned.getexif())
    os.rename(os.fsencode(tmp_path / "a.jpg"), os.fsencode(tmp_path) + b"/\xe9.jpg")
    run(make_job(tmp_path, tmp_path / "out"), engine)
    table = index(tmp_path / "out")
    assert (table["id"], table["status"]) == (["\\xe9.jpg"], ["ok"])
    assert (table["width"], table["height"]) == ([30], [50])


def test_a_listed_file_that_is_not_there_is_a_failed_row(tmp_path, engine):
    photograph(50, 50).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("gone.jpg\na.png\n")
    run(make_job(tmp_path / "list.txt", tmp_path / "out"), engine)
    table = index(tmp_path / "out")
    assert table["reason"] == ["no such file", None]
    assert table["row"] == [None, 0]


def test_all_images_broken_is_an_output_without_rows(tmp_path, engine):
    touch(tmp_path / "in", "a.jpg", "b.jpg")
    summary = run(make_job(tmp_path / "in", tmp_path / "out"), engine)
    assert (summary.rows, summary.failed) == (0, 2)
    assert feature(tmp_path / "out", "sparse").shape == (0, 8, 64)
    assert index(tmp_path / "out")["row"] == [None, None]


def test_images_come_out_of_archives_in_stores(tmp_path, engine):
    """By an address that is a chain, opened again in the decoding processes."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x/a.png", "b.png"):
            with archive.open(name, "w") as file:
                photograph(50, 40, seed=len(name)).save(file, "PNG")
    run(make_job(f"zip://::file://{tmp_path}/a.zip", tmp_path / "out"), engine)
    table = index(tmp_path / "out")
    assert (table["id"], table["reason"]) == (["b.png", "x/a.png"], [None, None])
    pixels = load_image(photograph(50, 40, seed=5), "card")[None]
    wanted = engine.encode(pixels, outputs=("cls",))["cls"][0].numpy()
    np.testing.assert_allclose(feature(tmp_path / "out", "cls")[0], wanted, atol=1e-5)


def test_the_parquet_format_has_ids_beside_the_same_rows(photographs, tmp_path, engine):
    arguments = {"partition_size": 10, "batch_size": 4, "dtype": "float16"}
    run(make_job(photographs, tmp_path / "npy", **arguments), engine)
    run(make_job(photographs, tmp_path / "parquet", format="parquet", **arguments), engine)
    table = index(tmp_path / "npy")
    assert index(tmp_path / "parquet") == table
    ids, rows = [], []
    for part in parts(tmp_path / "parquet"):
        assert {path.name for path in part.iterdir()} == {
            *("features.parquet", "index.parquet", "manifest.json")
        }
        content = parquet.read_table(part / "features.parquet")
        facts = json.loads(content.schema.metadata[b"stellar_fast"])["sparse"]
        assert facts == {"shape": [8, 64], "dtype": "float16"}
        ids += content["id"].to_pylist()
        rows += [
            np.array(value, facts["dtype"]).reshape(facts["shape"])
            for value in content["sparse"].to_pylist()
        ]
    good = zip(table["id"], table["row"], strict=True)
    assert ids == [name for name, row in good if row is not None]
    np.testing.assert_array_equal(np.stack(rows), feature(tmp_path / "npy", "sparse"))


def test_no_more_images_are_taken_than_there_are_slots(photographs):
    items = make_job(photographs, "nowhere", dummy_writer=True).items * 20
    taken = []
    workers = Workers(2, "card", 8)
    room = workers._ahead
    assert room <= 2 * 8 + 2 * 2 * 8
    try:
        outcomes = workers.decode((taken.append(item) or item for item in items), lambda: False)
        for number, outcome in enumerate(outcomes):
            if number in (0, 100):
                for process in workers._processes:
                    # Until it has answered: it would go on, if it had room.
                    assert not process.lists or process.connection.poll(60)
            assert outcome.number == number
            assert len(taken) <= number + room + 4  # a list that waits for slots
    finally:
        workers.close()
    assert len(taken) == len(items) == number + 1


# Options


def test_shares_make_every_partition_once_and_the_same_files(photographs, tmp_path, engine):
    arguments = {"partition_size": 5, "batch_size": 4}
    run(make_job(photographs, tmp_path / "whole", **arguments), engine)
    output = tmp_path / "shares"
    made = []
    for k in (3, 1, 2):
        summary = run(make_job(photographs, output, partitions=f"{k}/3", **arguments), engine)
        made.append(summary.partitions)
        assert (output / f"stats-{k}-of-3.json").is_file()
    assert made == [1, 2, 2]
    assert contents(output) == contents(tmp_path / "whole")
    assert run(make_job(photographs, output, **arguments), engine).images == 0


def test_failed_images_are_tried_again_when_asked(tmp_path, engine):
    photos = tmp_path / "photos"
    write_photographs(photos, good=12, broken=0)
    paths = sorted(path for path in photos.rglob("*.*"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    away = {path: path.read_bytes() for path in (paths[0], paths[2], paths[3], paths[8])}
    for format in FORMATS:
        for path in away:
            path.write_bytes(b"")
        output = tmp_path / format
        arguments = {"partition_size": 4, "batch_size": 1, "format": format}
        summary = run(make_job(tmp_path / "list.txt", output, **arguments), engine)
        assert summary.failed == 4
        before = contents(output)
        assert run(make_job(tmp_path / "list.txt", output, **arguments), engine).all_failed == 4
        again = make_job(tmp_path / "list.txt", output, retry_failed=True, **arguments)
        assert run(again, engine).all_failed == 4
        assert contents(output) == before
        for path in list(away)[1:]:
            path.write_bytes(away[path])
        assert run(again, engine).all_failed == 1
        paths[0].write_bytes(away[paths[0]])
        assert run(again, engine).all_failed == 0
        if format == "npy":
            # One image a batch, so that the batches are the same in a run that never failed.
            run(make_job(tmp_path / "list.txt", tmp_path / "whole", **arguments), engine)
            assert contents(output) == contents(tmp_path / "whole")
        else:
            table = parquet.read_table(output / "part-00000" / "features.parquet")
            assert table["id"].to_pylist() == index(output)["id"][:4]
            sparse = np.stack([np.array(row, "f4") for row in table["sparse"].to_pylist()])
            np.testing.assert_array_equal(
                sparse.reshape(4, 8, 64), np.load(tmp_path / "npy" / "part-00000" / "sparse.npy")
            )


def test_the_first_failure_or_one_too_many_stops_a_run_that_can_be_gone_on_with(
    photographs, tmp_path, engine
):
    output = tmp_path / "out"
    arguments = {"partition_size": 8, "batch_size": 4}
    with pytest.raises(StellarError, match=r"broken\S+: .*--on-error record"):
        run(make_job(photographs, output, on_error="fail", **arguments), engine)
    with pytest.raises(StellarError, match=r"3 images failed, more than --max-errors 2"):
        run(make_job(photographs, output, max_errors=2, **arguments), engine)
    assert not [name for name in os.listdir(output) if "partial" in name]
    stats = json.loads((output / "stats.json").read_text())
    assert stats["outcome"].startswith("error: 3 images failed")
    run(make_job(photographs, output, max_errors=4, **arguments), engine)
    run(make_job(photographs, tmp_path / "whole", **arguments), engine)
    assert contents(output) == contents(tmp_path / "whole")


def test_dummies_measure_and_write_nothing_or_read_nothing(photographs, tmp_path, engine):
    summary = run(make_job(photographs, tmp_path / "out", dummy_writer=True), engine)
    assert (summary.images, summary.rows) == (24, 20)
    assert os.listdir(tmp_path) == []
    summary = run(make_job(photographs, tmp_path / "out", dummy_reader=True), engine)
    assert (summary.images, summary.rows, summary.seconds["read"]) == (24, 24, 0)
    rows = feature(tmp_path / "out", "cls")
    assert len(rows) == 24
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:1], rows.shape), atol=1e-5)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(stats, "time", clock)
    progress = Progress(100, 30)
    clock.now += 29
    progress.update(10, 1, {"wait": 1.0, "encode": 0.1, "decode": 3.0, "read": 1.0})
    assert capsys.readouterr().err == ""
    clock.now += 1
    progress.update(20, 2, {"wait": 0.0})
    line = "30 of 100 images, 3 failed, 1.0 images/s, 70 s left; limited by decode\n"
    assert capsys.readouterr().err == line
    progress.update(20, 2, {})
    assert capsys.readouterr().err == ""
    progress.close()


# Numbers that do not fit


def test_float16_overflow_is_an_error_that_says_float32(photographs, tmp_path, engine):
    with pytest.raises(StellarError, match=r"beyond the largest float16.*--dtype float32"):
        run(make_job(photographs, tmp_path / "out", dtype="float16"), scaled(engine, 1e6))
    assert parts(tmp_path / "out") == []
    run(make_job(photographs, tmp_path / "other", dtype="float32"), scaled(engine, 1e6))


def test_nan_from_the_model_is_an_error_and_not_a_row(photographs, tmp_path, engine):
    with pytest.raises(StellarError, match="NaN or infinity in sparse"):
        run(make_job(photographs, tmp_path / "out", dtype="float32"), scaled(engine, float("nan")))
    assert parts(tmp_path / "out") == []


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ("sparse", "lowrank")}, "spatial @ sparse"),
        ({"features": ("sparse", "dance")}, "dance"),
        ({"features": ()}, "none"),
        ({"dtype": "bfloat16"}, "float32, float16"),
        ({"format": "csv"}, "npy, parquet"),
        ({"on_error": "ignore"}, "record, fail"),
        ({"preset": "crop"}, "card, eval"),
        ({"batch_size": 0}, "batch size"),
        ({"partition_size": 0}, "partition size"),
        ({"workers": 0}, "workers"),
        ({"max_errors": -1}, "max_errors"),
        ({"partitions": "0/2"}, "0/2"),
        ({"partitions": "3/2"}, "3/2"),
        ({"partitions": "1/2", "overwrite": True}, "starts anew"),
        ({"resume": True, "overwrite": True}, "starts anew"),
        ({"resume": True}, "nothing to resume"),
    ],
)
def test_arguments_that_cannot_be(photographs, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_job(photographs, tmp_path / "out", **arguments)


def test_an_output_that_holds_the_input_or_is_elsewhere_is_refused(tmp_path):
    touch(tmp_path, "out/photographs/a.jpg")
    with pytest.raises(ValueError, match="holds the input"):
        make_job(tmp_path / "out" / "photographs", tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match="holds the input"):
        make_job(tmp_path / "out", tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match="folder of this machine, or one in a store"):
        make_job(tmp_path / "out" / "photographs", "https://host/out")
