"""Extraction's output folder: whole or not there, whatever happens on the way."""

import os
from pathlib import Path

import pytest
from engines import small_engine
from extracting import Wrapped, scaled, touch
from scenes import write_photographs

from stellar_fast import StellarError
from stellar_fast.extract import folder, plan, run


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, good=6, broken=2)
    return root


def test_an_output_is_overwritten_only_when_asked(photographs, tmp_path, engine):
    output = tmp_path / "out"
    run(plan(photographs, output), engine)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        plan(photographs, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    run(plan(photographs, output, features=("spatial",), overwrite=True), engine)
    assert sorted(os.listdir(output)) == ["index.parquet", "run.json", "spatial.npy"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_overwrite_leaves_the_earlier_output(
    photographs, tmp_path, engine, monkeypatch, exchange
):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda first, second: False)
    output = tmp_path / "out"
    run(plan(photographs, output), engine)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    job = plan(photographs, output, dtype="float16", overwrite=True)
    with pytest.raises(StellarError, match="float32"):
        run(job, scaled(engine, 1e6))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    run(plan(photographs, output, features=("cls",), overwrite=True), engine)
    assert sorted(os.listdir(output)) == ["cls.npy", "index.parquet", "run.json"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("names", [("thesis.tex",), ("index.parquet", "thesis.tex"), ("a.npy",)])
def test_overwrite_removes_nothing_that_is_not_an_output(photographs, tmp_path, names):
    touch(tmp_path / "out", *names)
    with pytest.raises(ValueError, match="only the output of an earlier extraction"):
        plan(photographs, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)


def test_an_empty_folder_is_taken_and_parents_are_made(photographs, tmp_path, engine):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new" / "deep"):
        run(plan(photographs, output), engine)
        assert (output / "index.parquet").is_file()
        (tmp_path / "plain").mkdir(exist_ok=True)
        assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_in_the_way_is_an_error(photographs, tmp_path):
    touch(tmp_path, "out")
    with pytest.raises(ValueError, match="there is a file of this name"):
        plan(photographs, tmp_path / "out")
    with pytest.raises(ValueError, match="not a folder"):
        plan(photographs, tmp_path / "out" / "below")


def test_what_appears_at_the_output_while_running_is_kept(photographs, tmp_path, engine):
    output = tmp_path / "out"

    def encode(images, **arguments):
        touch(output, "thesis.tex")
        return engine.encode(images, **arguments)

    with pytest.raises(ValueError, match="not empty"):
        run(plan(photographs, output), Wrapped(engine, encode))
    assert os.listdir(output) == ["thesis.tex"]
    assert os.listdir(tmp_path) == ["out"]


def test_two_runs_to_one_output_at_once_are_refused(photographs, tmp_path, engine):
    job = plan(photographs, tmp_path / "out")

    def encode(images, **arguments):
        if len(images):
            with pytest.raises(StellarError, match="another run is writing"):
                run(job, engine)
        return engine.encode(images, **arguments)

    run(job, Wrapped(engine, encode))
    assert os.listdir(tmp_path) == ["out"]


def test_other_names_are_not_taken_for_leftovers(photographs, tmp_path, engine):
    touch(tmp_path, ".out.partial-dead/sparse.npy", ".outer.partial-x/a", "out.partial-y/a")
    run(plan(photographs, tmp_path / "out"), engine)
    assert sorted(os.listdir(tmp_path)) == [".outer.partial-x", "out", "out.partial-y"]


def test_interruption_leaves_nothing(photographs, tmp_path, engine):
    def encode(images, **arguments):
        if len(images):
            raise KeyboardInterrupt
        return engine.encode(images, **arguments)

    with pytest.raises(KeyboardInterrupt):
        run(plan(photographs, tmp_path / "out"), Wrapped(engine, encode))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_clear_error(photographs, tmp_path, engine, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".npy"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StellarError, match=r"cls\.npy: cannot be written: No space left.*room"):
        run(plan(photographs, tmp_path / "out"), engine)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_in_mid_write_is_one_clear_error(photographs, tmp_path, engine, monkeypatch):
    opened = Path.open

    def open_full(path, mode="r", *arguments, **named):
        return opened(
            Path("/dev/full") if path.name == "dense.npy" else path, mode, *arguments, **named
        )

    batches = []

    def encode(images, **arguments):
        batches.append(len(images))
        return engine.encode(images, **arguments)

    monkeypatch.setattr(Path, "open", open_full)
    counted = Wrapped(engine, encode)
    with pytest.raises(StellarError, match=r"dense\.npy: cannot be written: No space left"):
        run(plan(photographs, tmp_path / "out", features=("dense",), batch_size=2), counted)
    assert batches == [0, 2]  # at the first rows, not at the end
    assert os.listdir(tmp_path) == []


def test_a_parent_that_may_not_be_written_is_told_before_any_work(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="may be written"):
        plan(photographs, tmp_path / "out")


def test_everything_is_on_disk_before_the_output_gets_its_name(
    photographs, tmp_path, engine, monkeypatch
):
    """The order of what reaches the disk: features, run, index, folder; rename; its parent."""
    events = []
    fsync, rename = os.fsync, os.rename

    def record(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(*arguments):
        events.append("rename")
        rename(*arguments)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", renamed)
    run(plan(photographs, tmp_path / "out"), engine)
    assert sorted(events[:2]) == ["cls.npy", "sparse.npy"]
    assert events[2:4] == ["run.json", "index.parquet"]
    assert events[4].startswith(".out.partial-")
    assert events[5:] == ["rename", tmp_path.name]
