"""Tars with headers that lie: each is one clear error, in bounded memory and time."""

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from tars import END, GOOD, LIES, A, header, member, pax

from stellar_fast.extract.input import archives, discover, door


def put(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "a.tar").write_bytes(content)
    return tmp_path / "a.tar"


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.timeout(60)
def test_headers_that_lie_are_one_error(kind, tmp_path):
    path = put(tmp_path, LIES[kind])
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        discover(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert "a.tar" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    if not kind.startswith("sparse"):  # which is an error where it is read
        with pytest.raises(ValueError):
            discover(f"tar://::{path}")


def test_a_sparse_header_whose_extensions_do_not_end(tmp_path):
    block = bytearray(header(b"b.txt", 0, b"S", b"ustar  \0"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = put(tmp_path, A + bytes(block) + (bytes(504) + b"\1" + bytes(7)) * 4)
    with pytest.raises(ValueError, match="cannot be read as a tar"):
        discover(path)


def by_tarfile(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path, "r:") as tar:
        return [
            (found.name, tar.extractfile(found).read())
            for found in tar
            if found.isfile() and found.name.endswith(".jpg") and "/._" not in found.name
        ]


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_honest_is_what_tarfile_says(kind, tmp_path):
    path = put(tmp_path, GOOD[kind] + END)
    found = [(item.id.removeprefix("a.tar::"), door.read_item(item)) for item in discover(path)]
    expected = by_tarfile(path)
    assert expected
    assert found == [
        (os.fsencode(name).decode("utf-8", "backslashreplace"), content)
        for name, content in expected
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_tarfile_are_read_whatever_their_format(format, tmp_path):
    names = ["a.jpg", "d" * 90 + "/b.jpg", "\u00e9\u4e2d.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += ["e" * 300 + ".jpg", "f/" * 200 + "g.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1000 * number + 1
            info.uid = 1 << 20 if format == tarfile.USTAR_FORMAT else 1 << 40
            info.pax_headers = {"SCHILY.xattr.user.x": "y" * 5000}
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    items = discover(tmp_path / "a.tar")
    assert [item.id for item in items] == [f"a.tar::{name}" for name in names]
    for number, item in enumerate(items):
        assert door.read_item(item) == bytes([number]) * (1000 * number + 1)


def test_many_empty_members_take_no_memory(tmp_path):
    """Twenty thousand that are no images: 10 MB of headers."""
    with open(tmp_path / "a.tar", "wb") as file:
        block = header(b"a.txt")
        for _ in range(20):
            file.write(block * 1000)
        file.write(A + END)
    tracemalloc.start()
    assert len(discover(tmp_path / "a.tar")) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_long_chains_of_headers_need_no_stack(tmp_path):
    chain = pax(comment="x") * 5000
    assert len(discover(put(tmp_path, chain + A + END))) == 1
    chain = member(b"x", b"b.jpg\0", kind=b"L") * 5000
    assert [item.id for item in discover(put(tmp_path, chain + A + END))] == ["a.tar::b.jpg"]


def test_headers_up_to_the_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_HEADER", 4096)
    for size, fits in ((4000, True), (5000, False)):
        path = put(tmp_path, pax(comment="x" * size) + A + END)
        if fits:
            assert len(discover(path)) == 1
        else:
            with pytest.raises(ValueError, match="more than the limit of 4096"):
                discover(path)


def test_names_of_members_are_printable(tmp_path):
    for name, shown in (
        (b"a\x1b[2J.jpg", "a\\x1b[2J.jpg"),
        (b"a\nb.jpg", "a\\nb.jpg"),
        ("a\u202egpj.jpg".encode(), "a\\u202egpj.jpg"),
        ("a\u200b.jpg".encode(), "a\\u200b.jpg"),
        (b"\xff.jpg", "\\xff.jpg"),
    ):
        for content in (member(name, b"x"), pax(path=name) + member(b"cut", b"x")):
            (item,) = discover(put(tmp_path, content + END))
            assert item.id == f"a.tar::{shown}"
            assert door.read_item(item) == b"x"
