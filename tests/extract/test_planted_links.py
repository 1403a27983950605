"""Links that a stranger left in an output folder: nothing outside is read, written or removed."""

import os
import stat
from pathlib import Path

import pytest
from scenes import write_photographs

import stellar_fast.extract.output.folder as folders
from stellar_fast import files
from stellar_fast.errors import StellarError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.output.folder import Locks, Staged
from stellar_fast.extract.output.layout import Partition, read_manifest, read_plan, write_json

SMALL = {"partition_size": 3, "batch_size": 2}


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder that must stay as it is."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("mine")
    (folder / "file").write_text("mine")
    yield folder
    assert sorted(path.name for path in folder.rglob("*")) == ["deep", "file", "file"]
    assert {path.read_text() for path in folder.rglob("file")} == {"mine"}


@pytest.fixture
def output(tmp_path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), good=5, broken=0)


@pytest.mark.parametrize("target", ["file", "deep", "absent", "/dev/null"])
def test_the_lock_is_no_link(output, outside, target):
    (output / ".lock").symlink_to(outside / target)
    with pytest.raises(StellarError, match=r"\.lock: is a link"):
        Locks(output)
    assert not (outside / "absent").exists()


def test_the_lock_is_a_file(output):
    os.mkfifo(output / ".lock")
    with pytest.raises(StellarError, match=r"\.lock: is no regular file"):
        Locks(output)
    (output / ".lock").unlink()
    (output / ".lock").mkdir()
    with pytest.raises(StellarError, match=r"\.lock: is a link or a folder"):
        Locks(output)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("target", ["deep", "absent"])
def test_a_partition_takes_the_place_of_a_link(output, outside, target, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    (output / "part-00000").symlink_to(outside / target)
    with Locks(output) as locks:
        staged = Staged(output, Partition(0, 1, ""), locks)
        (staged.folder / "file").write_text("new")
        staged.publish()
    assert not (output / "part-00000").is_symlink()
    assert (output / "part-00000" / "file").read_text() == "new"
    assert sorted(os.listdir(output)) == [".lock", "part-00000"]


def test_what_a_dead_run_left_may_be_a_link(output, outside):
    for name in ("deep", "absent", "file"):
        (output / f".part-00000.partial-{name}").symlink_to(outside / name)
    with Locks(output) as locks:
        staged = Staged(output, Partition(0, 1, ""), locks)
        assert sorted(os.listdir(output)) == sorted([".lock", staged.folder.name])
        staged.drop()
    for name in ("deep", "absent", "file"):
        (output / f".stats.{name}.json").symlink_to(outside / name)
    write_json(output / "stats.json", {"outcome": "complete"})
    assert sorted(os.listdir(output)) == [".lock", "stats.json"]


@pytest.mark.parametrize("name", ["stats.json", "plan.json"])
def test_a_link_is_replaced_and_not_written_through(output, outside, name):
    (output / name).symlink_to(outside / "file")
    write_json(output / name, {"a": 1})
    assert not (output / name).is_symlink()


def test_a_guessed_temporary_name_is_not_written_through(output, outside, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda bytes: "guessed")
    (output / ".model.guessed.json").symlink_to(outside / "file")
    with (
        pytest.raises(StellarError, match="cannot be written: File exists"),
        files.replacing(output / "model.json") as temporary,
    ):
        temporary.write_text("theirs")
    # Those of partitions are looked for and removed first: one that comes after that.
    made = Path.mkdir

    def late(path: Path, *arguments: int, **named: bool) -> None:
        if path.name.startswith(".part-"):
            path.symlink_to(outside / "deep")
        made(path, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", late)
    with Locks(output) as locks, pytest.raises(StellarError, match="File exists"):
        Staged(output, Partition(0, 1, ""), locks)


def test_resuming_does_not_read_through_a_link(photographs, output, outside, engine):
    run(make_job(photographs, output, **SMALL), engine)
    plan = read_plan(output)
    (output / "part-00000").rename(output.parent / "moved")
    (output / "part-00000").symlink_to(output.parent / "moved")
    with pytest.raises(StellarError, match=r"part-00000.*is a link"):
        read_manifest(output, plan, 0)
    with pytest.raises(StellarError, match=r"part-00000.*is a link"):
        run(make_job(photographs, output, **SMALL), engine)


def test_overwriting_removes_links_and_not_what_they_lead_to(photographs, output, outside, engine):
    run(make_job(photographs, output, **SMALL), engine)
    for name in ("part-00001", "part-00007", ".part-00000.partial-x", "stats-1-of-2.json"):
        path = output / name
        if path.is_dir():
            path.rename(output.parent / "moved")
        path.symlink_to(outside / ("file" if name.endswith("json") else "deep"))
    (output / "part-00000" / "inner").symlink_to(outside)
    summary = run(make_job(photographs, output, overwrite=True, **SMALL), engine)
    assert summary.images == 5
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert not (output / "part-00007").exists()


def test_the_umask_is_left_alone(photographs, output, engine, monkeypatch):
    """It is the whole process's: other threads would make files that anyone may write to."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        run(make_job(photographs, output, **SMALL), engine)
    finally:
        monkeypatch.undo()
        os.umask(before)
    for part in output.glob("part-*"):
        assert stat.S_IMODE(part.stat().st_mode) == 0o750
        for path in part.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
