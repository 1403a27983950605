"""Extraction on a system that refuses: full disks, read-only folders; what dead runs leave."""

import os
import resource
from pathlib import Path

import pytest
from extracting import SMALL, Wrapped, contents, parts, scaled, touch

from stellar_fast import StellarError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.job import decided, make_plan
from stellar_fast.extract.output import folder

pytestmark = pytest.mark.usefixtures("one_decoding_process")


def test_leftovers_of_a_dead_run_are_removed(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL)
    make_plan(job, decided(job, engine))
    touch(output, ".part-00001.partial-dead/sparse.npy", ".part-00001.partial-x-earlier/a")
    run(make_job(photographs, output, **SMALL), engine)
    assert contents(output) == whole


def test_a_full_disk_at_the_end_is_one_clear_error(photographs, tmp_path, engine, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("sparse.npy"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    output = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StellarError, match=r"sparse\.npy: cannot be written: No space left.*room"):
        run(make_job(photographs, output, **SMALL), engine)
    assert sorted(os.listdir(output)) == [".lock", "inputs.parquet", "plan.json", "stats.json"]


def test_a_full_disk_in_mid_write_is_one_clear_error_and_the_run_can_go_on(
    photographs, tmp_path, engine, whole
):
    """By a limit on the size of files, which is an error of the system like ENOSPC."""
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL)
    make_plan(job, decided(job, engine))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    batches = []

    def encode(images, **arguments):
        if len(images):
            batches.append(len(images))
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        return engine.encode(images, **arguments)

    try:
        with pytest.raises(StellarError, match=r"sparse\.npy: cannot be written: File too large"):
            run(make_job(photographs, output, **SMALL), Wrapped(engine, encode))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert batches[0] == 2
    assert parts(output) == []
    assert not [name for name in os.listdir(output) if "partial" in name]
    run(make_job(photographs, output, **SMALL), engine)
    assert contents(output) == whole


def test_an_output_that_may_not_be_written_is_told_before_any_work(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="may be written"):
        make_job(photographs, tmp_path / "out")


def test_an_output_that_becomes_read_only_is_one_clear_error(
    photographs, tmp_path, engine, monkeypatch, whole
):
    output = tmp_path / "out"
    made = Path.mkdir

    def refuse(path, *arguments, **named):
        if path.name.startswith(".part-00001"):
            raise OSError(30, "Read-only file system")
        return made(path, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        with pytest.raises(StellarError, match="part-00001: cannot be written: Read-only file"):
            run(make_job(photographs, output, **SMALL), engine)
    run(make_job(photographs, output, **SMALL), engine)
    assert contents(output) == whole


@pytest.mark.parametrize("exchange", [True, False])
def test_a_partition_takes_the_place_of_an_earlier_one(
    photographs, tmp_path, engine, monkeypatch, exchange, whole
):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda first, second: False)
    output = tmp_path / "out"
    run(make_job(photographs, output, **SMALL), engine)
    (output / "part-00000" / "manifest.json").unlink()
    run(make_job(photographs, output, **SMALL), engine)
    assert contents(output) == whole


def test_everything_is_on_disk_before_a_partition_gets_its_name(
    photographs, tmp_path, engine, monkeypatch
):
    """The order of what reaches the disk: the images' list, the plan, their folder; then features,
    index, manifest, folder; rename; its parent."""
    output = tmp_path / "out"
    job = make_job(photographs, output)
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(*arguments):
        events.append("rename")
        rename(*arguments)

    def replaced(*arguments):
        events.append("replace")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    make_plan(job, decided(job, engine))
    assert [event.split(".")[-1] for event in events] == [
        *("parquet", "replace", "json", "replace", "out")
    ]
    events.clear()
    run(job, engine)
    assert sorted(events[:2]) == ["cls.npy", "sparse.npy"]
    assert events[2:4] == ["index.parquet", "manifest.json"]
    assert events[4].startswith(".part-00000.partial-")
    assert events[5:7] == ["rename", "out"]


def test_what_fails_to_fit_leaves_earlier_partitions(photographs, tmp_path, engine):
    output = tmp_path / "out"
    job = make_job(photographs, output, dtype="float16", **SMALL)
    with pytest.raises(StellarError, match="float32"):
        run(job, scaled(engine, 1e6))
    assert parts(output) == []
