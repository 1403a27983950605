"""What an image is, in a folder and in a tar alike; what is left out is counted."""

import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from engines import small_engine
from extracting import index, touch
from pictures import photograph

from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import archives, discover, door
from stellar_fast.extract.input.sieve import MOST_REASONS, Sieve, told


def found(source: Path) -> tuple[list[str], dict[str, int]]:
    sieve = Sieve()
    ids = [item.id.rpartition("::")[2] for item in discover(source, sieve=sieve)]
    return sorted(ids), dict(sieve.skipped)


def packed(folder: Path, path: Path, form: str = "gnu") -> Path:
    subprocess.run(["tar", f"--format={form}", "-cf", path, "-C", folder, "."], check=True)
    return path


def make(folder: Path) -> None:
    """Folders with all that the two could differ about."""
    touch(folder, "cat/1.jpg", "cat/2.JPG", "cat/._1.jpg", ".hidden/h.jpg", "dog/.d/x/y.png")
    touch(folder, "dog/three.dots...png", "cat/a.heic", "cat/b.HEIC", "notes.txt", "README")
    (folder / "cat" / "1.jpg").write_bytes(b"one")
    (folder / "blob").write_bytes(b"two")
    (folder / "cat" / "soft.jpg").symlink_to("1.jpg")
    (folder / "dog" / "up.jpg").symlink_to("../cat/soft.jpg")
    (folder / "dog" / "blob.jpg").symlink_to("../blob")
    os.link(folder / "cat" / "1.jpg", folder / "dog" / "hard.jpg")
    (folder / "mirror").symlink_to("cat")  # a folder that is visited by its own path
    (folder / "dog" / "through.jpg").symlink_to("../mirror/1.jpg")


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_a_tar_has_the_images_of_its_folder(form, tmp_path):
    make(tmp_path / "in")
    images = [
        *("cat/1.jpg", "cat/2.JPG", "cat/soft.jpg", "dog/blob.jpg", "dog/hard.jpg"),
        *("dog/three.dots...png", "dog/through.jpg", "dog/up.jpg"),
    ]
    others = {".heic files": 2, ".txt files": 1, "files without a suffix": 2}
    ids, skipped = found(tmp_path / "in")
    assert ids == images
    assert skipped == {**others, "hidden images": 1, "hidden folders": 2}
    path = packed(tmp_path / "in", tmp_path / "a.tar", form)
    ids, skipped = found(path)
    assert [name.removeprefix("./") for name in ids] == images
    # A link without a suffix is a folder's, or a file's that is no image.
    assert skipped == {**others, "hidden images": 3, "files without a suffix": 3}
    contents = {item.id.rpartition("/")[2]: item for item in discover(path)}
    for name, content in (("soft", b"one"), ("up", b"one"), ("hard", b"one"), ("blob", b"two")):
        assert door.read_item(contents[f"{name}.jpg"]) == content
    assert door.read_item(contents["through.jpg"]) == b"one"


def test_a_zip_has_the_images_of_its_folder(tmp_path):
    make(tmp_path / "in")
    (tmp_path / "in" / "dog" / "gone.jpg").symlink_to("none.jpg")
    ids, _ = found(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted((tmp_path / "in").rglob("*")):
            name = path.relative_to(tmp_path / "in").as_posix()
            if path.is_symlink():
                link = zipfile.ZipInfo(name)
                link.create_system, link.external_attr = 3, 0o120777 << 16
                archive.writestr(link, os.readlink(path))
            elif path.is_file():
                archive.write(path, name)
    items = discover(f"zip://::{tmp_path}/a.zip")
    assert [item.id for item in items] == ids
    by_name = {item.id: item for item in items}
    for name, content in (("cat/soft", b"one"), ("dog/up", b"one"), ("dog/blob", b"two")):
        assert door.read_item(by_name[f"{name}.jpg"]) == content
    assert door.read_item(by_name["dog/through.jpg"]) == b"one"
    assert (
        door.read_item(by_name["dog/gone.jpg"]) == b"none.jpg"
    )  # which is no picture: a failed line


def linked(path: Path, *links: tuple[str, str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"one"))
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.linkname, member.type = target, kind
            tar.addfile(member)
    return path


def test_links_that_lead_nowhere_are_counted(tmp_path):
    path = linked(
        tmp_path / "a.tar",
        ("round.jpg", "circle.jpg", tarfile.SYMTYPE),
        ("circle.jpg", "round.jpg", tarfile.SYMTYPE),
        ("self.jpg", "self.jpg/x", tarfile.SYMTYPE),  # grows with every step
        ("out.jpg", "/etc/passwd", tarfile.SYMTYPE),
        ("up.jpg", "../../etc/passwd", tarfile.SYMTYPE),
        ("gone.jpg", "none.jpg", tarfile.LNKTYPE),
        ("pipe.jpg", "", tarfile.FIFOTYPE),
        ("good.jpg", "x/../a.jpg", tarfile.SYMTYPE),
    )
    ids, skipped = found(path)
    assert ids == ["a.jpg", "good.jpg"]
    assert skipped == {
        "links that lead to no file of the tar": 6,
        "members that are no files": 1,
    }


def test_links_with_long_names(tmp_path):
    deep = "/".join(["folder"] * 40)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(f"{deep}/a.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"one"))
        member = tarfile.TarInfo("b.jpg")
        member.linkname, member.type = f"{deep}/a.jpg", tarfile.LNKTYPE
        tar.addfile(member)
    (first, second) = discover(tmp_path / "a.tar")
    assert second.id == "a.tar::b.jpg" and second.offset == first.offset


def test_links_of_links_are_followed_in_bounded_time(tmp_path):
    """Each of thousands leads through folders that are links, forty times."""
    links = [(f"{n}.jpg", f"d{n % 50}/" * 200 + "x", tarfile.SYMTYPE) for n in range(500)]
    links += [(f"d{n}", f"d{(n + 1) % 50}", tarfile.SYMTYPE) for n in range(50)]
    assert found(linked(tmp_path / "a.tar", *links))[0] == ["a.jpg"]


# Tars behind one another


def tar_of(*names: str, end: bytes = bytes(1024)) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()[: 512 * len(names)] + end


@pytest.mark.parametrize("zeros", [512, 1024, 10240, 3 << 20])
def test_tars_behind_one_another_are_one(zeros, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of("a.jpg", end=bytes(zeros)) + tar_of("b.jpg") + tar_of("c.jpg"))
    assert found(path)[0] == ["a.jpg", "b.jpg", "c.jpg"]
    path.write_bytes(tar_of("a.jpg") + tar_of("a.jpg"))
    with pytest.raises(ValueError, match="in the tar twice"):
        discover(path)


def test_what_follows_a_tar_and_is_none(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    for behind in (b"x", b"garbage" * 100, bytes(5000) + b"x", b"\x1f\x8b" + bytes(600)):
        path.write_bytes(tar_of("a.jpg") + behind)
        with pytest.raises(ValueError, match="cut off or damaged at byte"):
            discover(path)
    for zeros in (0, 1, 511, 9216, 2 << 20):
        path.write_bytes(tar_of("a.jpg") + bytes(zeros))
        assert found(path)[0] == ["a.jpg"]
    monkeypatch.setattr(archives, "MAX_ZEROS", 1 << 20)
    path.write_bytes(tar_of("a.jpg") + bytes(4 << 20))
    with pytest.raises(ValueError, match="more than 1048576 bytes of zeros"):
        discover(path)


def test_zips_behind_one_another_are_an_error(tmp_path):
    from archived import zipped

    first, second = zipped(**{"a.jpg": b"1"}), zipped(**{"b.jpg": b"2"})
    (tmp_path / "a.zip").write_bytes(first + second)
    with pytest.raises(ValueError, match="another zip before"):
        discover(f"zip://::{tmp_path}/a.zip")
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" + second)  # one that unpacks itself
    assert found(f"zip://::{tmp_path}/a.zip")[0] == ["b.jpg"]


# What is told


def test_the_run_tells_what_it_left_out(tmp_path):
    touch(tmp_path, *(f"in/{n}.heic" for n in range(3)), "in/.b.jpg")
    photograph(30, 30).save(tmp_path / "in" / "a.jpg")
    job = make_job(tmp_path / "in", tmp_path / "out")
    summary = run(job, small_engine())
    assert "; left out: 3 .heic files, 1 hidden images" in str(summary)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["skipped"] == {".heic files": 3, "hidden images": 1}
    summary = run(make_job(tmp_path / "in", tmp_path / "out"), small_engine())
    assert str(summary).endswith(
        "done by earlier or other runs; left out: 3 .heic files, 1 hidden images"
    )


def test_reasons_are_bounded_and_printable():
    sieve = Sieve()
    for number in range(1000):
        sieve.keeps(f"a.{number}")
    sieve.keeps("a." + "x" * 10_000)
    sieve.keeps("a.\x1b")
    assert len(sieve.skipped) <= MOST_REASONS + 1 and sieve.skipped.total() == 1002
    assert told(sieve.skipped).isprintable() and len(told(sieve.skipped)) < 200
    with pytest.raises(ValueError, match=r"found 1 \.heic files"):
        raise ValueError(_nothing("a.heic"))


def _nothing(name: str) -> str:
    sieve = Sieve()
    sieve.keeps(name)
    return sieve.nothing()


# One entry's error


def test_entries_that_cannot_be_read_stop_nothing(tmp_path):
    root = tmp_path / "in"
    photograph(30, 30).save((root / "x.tar").mkdir(parents=True) or root / "x.tar" / "a.png")
    for name, target in (("loop", "loop"), ("loop.jpg", "loop.jpg"), ("long", "x" * 4000)):
        (root / name).symlink_to(target)
    (root / "through").symlink_to("x.tar/a.png/none")  # ENOTDIR
    (root / "long.png").symlink_to(("y" * 200 + "/") * 19)
    run(make_job(root, tmp_path / "out"), small_engine())
    table = index(tmp_path / "out")
    assert table["id"] == ["long.png", "loop.jpg", "x.tar/a.png"]
    assert table["status"] == ["failed", "failed", "ok"]
    assert found(root / "x.tar")[0] == ["a.png"]  # a folder of this name


def test_a_folder_among_the_files_of_a_pattern(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of("a.jpg"))
    touch(tmp_path, "b.tar/b.jpg")
    for pattern in ("*.tar", "{a,b}.tar"):
        ids, skipped = found(tmp_path / pattern)
        assert ids == ["a.jpg"]
        assert skipped == {"folders among the files of a pattern": 1}


def test_paths_longer_than_the_system_takes(tmp_path):
    touch(tmp_path, "a.jpg")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
        Path("b.jpg").touch()
    finally:
        os.chdir(here)
    ids = [item.id for item in discover(tmp_path)]
    assert ids[0] == "a.jpg" and len(ids) == 2  # the folder that could not be listed
    subprocess.run(["rm", "-rf", tmp_path / ("d" * 250)], check=True)
