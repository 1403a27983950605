"""Extraction: which images are read from folders, lists, tars and stores, and how."""

import io
import os
import tarfile
from pathlib import Path

import fsspec
import pyarrow
import pytest
from extracting import touch
from pyarrow import csv, parquet

from stellar_fast import ImageError
from stellar_fast.extract import input as inputs
from stellar_fast.extract.input import door
from stellar_fast.extract.input.addresses import Allowed
from stellar_fast.extract.records import Item

ALLOWED = Allowed(frozenset({"memory"}))


def discover(source, column=None):
    return inputs.discover(source, column, ALLOWED)


def read_item(item):
    return door.read_item(item, ALLOWED)


def expand(pattern):
    return door.expand(pattern, ALLOWED)


def ids(items) -> list[str]:
    return [item.id for item in items]


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_a_folder_is_read_recursively_sorted_by_path_and_known_suffixes_only(tmp_path):
    names = ("b.jpg", "a/z.PNG", "a/c/y.webp", "a.tiff")
    touch(tmp_path, *names, "notes.txt", "a/x.npy", ".hidden.jpg", ".cache/x.jpg", "a/.DS_Store")
    items = discover(tmp_path)
    assert ids(items) == ["a.tiff", "a/c/y.webp", "a/z.PNG", "b.jpg"]
    assert all(Path(item.file).is_file() for item in items)


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    touch(tmp_path, "in/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in")
    assert ids(discover(tmp_path / "in")) == ["a.jpg", "linked/b.jpg"]


def test_a_folder_that_cannot_be_listed_is_a_failed_line(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ids(discover(tmp_path)) == ["a.jpg", "locked"]
    with pytest.raises(PermissionError, match="locked"):
        discover(tmp_path / "locked")


def test_a_list_keeps_its_order_and_counts_paths_from_its_own_folder(tmp_path):
    touch(tmp_path, "lists/b.jpg", "a.dat")
    source = tmp_path / "lists" / "all.txt"
    absolute = str(tmp_path / "lists" / "c.png")
    lines = f"\ufeffb.jpg\r\n\n../a.dat\n{absolute}\nmissing one.jpg\nhttps://host/d.jpg"
    source.write_bytes(lines.encode())
    items = discover(source)
    assert ids(items) == ["b.jpg", "../a.dat", absolute, "missing one.jpg", "https://host/d.jpg"]
    assert [item.file for item in items] == [
        str(tmp_path / "lists" / "b.jpg"),
        str(tmp_path / "a.dat"),
        absolute,
        str(tmp_path / "lists" / "missing one.jpg"),
        "https://host/d.jpg",
    ]


def test_a_file_listed_twice_is_an_error_that_names_both_lines(tmp_path):
    source = tmp_path / "list.txt"
    source.write_text(f"a.jpg\nb.jpg\n\n./sub/../a.jpg\nfile://{tmp_path}/b.jpg\n")
    with pytest.raises(ValueError, match=r"line 1 and .*line 4 .*a\.jpg"):
        discover(source)
    source.write_text(f"a.jpg\nb.jpg\nfile://{tmp_path}/b.jpg\n")
    with pytest.raises(ValueError, match=r"line 2 and .*line 3 .*b\.jpg"):
        discover(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder, list or tar"),
        (lambda path: path.mkdir(), "no images in this folder"),
        (lambda path: path.write_text(""), "is no folder"),
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
    with pytest.raises(ValueError, match="no such list"):
        discover("memory://nowhere/list.txt")


# Tables

TABLE = pyarrow.table({"n": [1, 2], "path": ["b.jpg", "sub/a.jpg"], "url": ["x.jpg", "y.jpg"]})


def write_table(table: pyarrow.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        options = csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
        csv.write_csv(table, path, options)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_column_of_a_table_is_a_list(tmp_path, suffix):
    source = write_table(TABLE, tmp_path / f"table{suffix}")
    items = discover(source, "path")
    assert [(item.id, item.file) for item in items] == [
        ("b.jpg", str(tmp_path / "b.jpg")),
        ("sub/a.jpg", str(tmp_path / "sub/a.jpg")),
    ]
    assert ids(discover(source, "url")) == ["x.jpg", "y.jpg"]
    with pytest.raises(ValueError, match=r"which column.*n, path, url.*--column"):
        discover(source)
    with pytest.raises(ValueError, match=r"no column 'image'.*n, path, url"):
        discover(source, "image")
    with pytest.raises(ValueError, match=r"'n' holds (int64|numbers)"):
        discover(source, "n")
    for columns in (["n", "url"], ["path"]):
        usual = write_table(TABLE.select(columns), tmp_path / f"usual{suffix}")
        assert ids(discover(usual)) == TABLE[columns[-1]].to_pylist()


def test_rows_without_a_path_and_damaged_tables_are_errors(tmp_path):
    empty = pyarrow.table({"path": ["a.jpg", None]})
    with pytest.raises(ValueError, match="line 2 has no path"):
        discover(write_table(empty, tmp_path / "empty.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        discover(tmp_path / "broken.parquet")
    (tmp_path / "broken.csv").write_text("path,n\na.jpg\n")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        discover(tmp_path / "broken.csv")
    with pytest.raises(ValueError, match="has no columns"):
        (tmp_path / "list.txt").write_text("a.jpg")
        discover(tmp_path / "list.txt", "path")


# Tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_tars_by_a_brace_pattern_give_their_members(tmp_path):
    for split in ("train", "val"):
        for number in (8, 9, 10):
            text = f"{split}{number}".encode()
            members = {"b/1.jpg": text * 700, "b/1.txt": b"x", "._a.jpg": b"", "a.PNG": text}
            write_tar(tmp_path / split / f"{number:03}.tar", members)
    items = discover(f"{tmp_path}/{{val,train}}/{{008..010}}.tar")
    assert ids(items)[:5] == [
        *("val/008.tar::b/1.jpg", "val/008.tar::a.PNG"),
        *("val/009.tar::b/1.jpg", "val/009.tar::a.PNG", "val/010.tar::b/1.jpg"),
    ]
    assert len(items) == 12
    assert read_item(items[-2]) == b"train10" * 700
    assert read_item(items[-1]) == b"train10"
    assert ids(discover(f"{tmp_path}/val/*.tar"))[0] == "008.tar::b/1.jpg"
    assert ids(discover(tmp_path / "val" / "010.tar"))[1] == "010.tar::a.PNG"


def test_patterns_expand_as_webdataset_has_them():
    assert expand("s3://b/{9..11}-{x,y}.tar") == (
        "s3://b/",
        [f"s3://b/{n}-{c}.tar" for n in (9, 10, 11) for c in "xy"],
    )
    assert expand("{0098..0100}.tar") == ("", ["0098.tar", "0099.tar", "0100.tar"])
    with pytest.raises(ValueError, match="neither a range"):
        expand("{5}.tar")
    with pytest.raises(ValueError, match="is empty"):
        expand("{5..3}.tar")
    with pytest.raises(ValueError, match="matches no file"):
        expand("memory://nothing/*.tar")


def test_members_and_tars_that_are_there_twice_are_errors(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(ValueError, match=r"twice\.tar::a\.jpg is in the tar twice"):
        discover(tmp_path / "twice.tar")
    write_tar(tmp_path / "once.tar", {"a.jpg": b"x"})
    with pytest.raises(ValueError, match=r"once\.tar twice"):
        discover(f"{tmp_path}/{{once,once}}.tar")


def test_damaged_tars_are_errors_and_lose_no_members_silently(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"x" * 1000 for n in range(5)})
    whole = path.read_bytes()
    assert len(discover(path)) == 5
    step = 512 + 1024  # a header and the content, padded
    for content, message in (
        (whole[: 2 * step], "cut off or damaged"),  # at the end of a member
        (whole[: 2 * step + 100], "cut off or damaged"),  # in a header
        (whole[: 2 * step - 700], "cannot be read as a tar"),  # in a member
        (whole[: 2 * step] + b"\xff" * 512 + whole[2 * step + 512 :], "cut off or damaged"),
        (b"\x1f\x8b" + whole, "compressed ones are not read"),
        (b"", "no images in it.* found 1 empty tars"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            discover(path)
    with pytest.raises(ValueError, match="no such tar"):
        discover(tmp_path / "none.tar")
    with pytest.raises(ValueError, match="no images in it"):
        discover(write_tar(tmp_path / "none.tar", {"a.txt": b""}))


def test_kinds_are_not_mixed(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x"})
    touch(tmp_path, "a.txt", "b.jpg", "c.jpg")
    with pytest.raises(ValueError, match="several kinds"):
        discover(f"{tmp_path}/a.*")
    with pytest.raises(ValueError, match="a pattern names tars or lists"):
        discover(f"{tmp_path}/*.jpg")


# Stores


def test_a_folder_in_a_store(memory):
    for name in ("b.jpg", "a/c.PNG", "a/.hidden.jpg", "notes.txt"):
        memory.pipe(f"/photos/{name}", name.encode())
    items = discover("memory://photos")
    assert ids(items) == ["a/c.PNG", "b.jpg"]
    assert [read_item(item) for item in items] == [b"a/c.PNG", b"b.jpg"]
    with pytest.raises(ValueError, match="no images"):
        discover("memory://other")


def test_lists_and_tars_in_a_store(memory, tmp_path):
    memory.pipe("/lists/a.txt", b"../photos/a.jpg\nmemory://photos/b.jpg\n/photos/c.jpg\n")
    for name in "abc":
        memory.pipe(f"/photos/{name}.jpg", name.encode())
    items = discover("memory://lists/a.txt")
    assert [read_item(item) for item in items] == [b"a", b"b", b"c"]
    tar = write_tar(tmp_path / "a.tar", {"x.jpg": b"content of x", "y.jpg": b"y"})
    for number in range(2):
        memory.pipe(f"/tars/{number}.tar", tar.read_bytes())
    for pattern in ("memory://tars/{0..1}.tar", "memory://tars/*.tar"):
        items = discover(pattern)
        assert ids(items) == ["0.tar::x.jpg", "0.tar::y.jpg", "1.tar::x.jpg", "1.tar::y.jpg"]
        assert [read_item(item) for item in items] == [b"content of x", b"y"] * 2


def test_an_unknown_store_is_an_error():
    with pytest.raises(ValueError, match="nosuch"):
        discover("nosuch://bucket/photos")


# One image


def reason_of(item: Item) -> str:
    with pytest.raises(ImageError) as caught:
        read_item(item)
    assert caught.value.path == item.id
    return caught.value.reason


def test_what_cannot_be_read_has_a_reason(tmp_path, memory, monkeypatch):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "short.tar").write_bytes(b"x" * 100)
    reasons = {
        "none": "no such file",
        "folder": "is a folder",
        "pipe": "is not a regular file",
        "empty": "empty file",
    }
    for name, reason in reasons.items():
        assert reason_of(Item(name, str(tmp_path / name))) == reason
    assert reason_of(Item("m", str(tmp_path / "short.tar"), 60, 50)) == (
        "40 of its 50 bytes are in the tar"
    )
    memory.pipe("/short.tar", b"x" * 100)
    assert "of its 50 bytes" in reason_of(Item("m", "memory://short.tar", 60, 50))
    assert reason_of(Item("m", "memory://none.jpg")) == "no such file"
    monkeypatch.setattr(door, "MAX_BYTES", 99)
    for file in (str(tmp_path / "short.tar"), "memory://short.tar"):
        assert reason_of(Item("m", file)) == "100 bytes are more than the limit of 99"

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert reason_of(Item("secret", str(tmp_path / "empty"))) == "permission denied"
