"""Zips and tars as folders: members that unpack to more, that lie, or have addresses as names."""

import tracemalloc
import zipfile

import pytest
from archived import write_tar, zipped
from loopback import LIMIT

from stellar_fast import ImageError
from stellar_fast.extract.input import archives, discover, door
from stellar_fast.extract.input.addresses import Allowed
from stellar_fast.extract.records import Item


def test_members_of_zips_are_not_unpacked_beyond_the_limit(server, tmp_path):
    bomb = zipped(a=bytes(LIMIT + 1), b=b"fine")
    assert len(bomb) < 4096
    server.answers["/a.zip"] = bomb
    (tmp_path / "a.zip").write_bytes(bomb)
    for place in (server.url("a.zip"), str(tmp_path / "a.zip")):
        for name, expected in (("a", "1048577 bytes are more than the limit"), ("c", "no such")):
            with pytest.raises(ImageError, match=expected):
                door.read_item(Item("a", f"zip://{name}::{place}"), Allowed.of(server.url()))
        item = Item("b", f"zip://b::{place}")
        assert door.read_item(item, Allowed.of(server.url())) == b"fine"


def patched(content: bytes, size: int) -> bytes:
    """A zip that says of its only member that it has `size` bytes."""
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = content.index(signature) + at
        content = content[:place] + size.to_bytes(4, "little") + content[place + 4 :]
    return content


def test_zips_that_lie_about_their_members(tmp_path):
    whole = zipped(a=bytes(10 << 20))
    for size in (0, 5, 100, (10 << 20) - 1, (10 << 20) + 1, 200 << 20):
        (tmp_path / "a.zip").write_bytes(patched(whole, size))
        tracemalloc.start()
        with pytest.raises(ImageError):
            door.read_item(Item("a", f"zip://a::{tmp_path}/a.zip"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size + (25 << 20)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packing_is_refused(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.jpg", b"x" * 1000)
    (item,) = discover(f"zip://::{tmp_path}/a.zip")
    with pytest.raises(ImageError, match=f"packed by method {method}"):
        door.read_item(item)


def test_a_zips_directory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_DIRECTORY", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(200):
            archive.writestr(f"{number}" + "x" * 10_000, b"")
    with pytest.raises(ValueError, match="its directory has more than"):
        discover(f"zip://::{tmp_path}/a.zip")
    (tmp_path / "a.zip").write_bytes(b"PK this is none")
    with pytest.raises(ValueError, match="cannot be read as a zip"):
        discover(f"zip://::{tmp_path}/a.zip")


def test_names_in_archives_are_no_addresses(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    for name in (f"a.jpg::{tmp_path}/secret.jpg", "a\n.jpg", f"x::file://{tmp_path}/secret.jpg"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, b"own")
        with pytest.raises(ValueError, match=r"no address|no such"):
            discover(f"zip://::{tmp_path}/a.zip")


def test_tars_as_archives(tmp_path, server):
    (tmp_path / "a.tar").write_bytes(write_tar(3, 1000))
    server.answers["/a.tar"] = write_tar(3, 1000)
    for place in (str(tmp_path / "a.tar"), server.url("a.tar")):
        allowed = Allowed.of(server.url())
        items = discover(f"tar://::{place}", allowed=allowed)
        assert [item.id for item in items] == ["0.jpg", "1.jpg", "2.jpg"]
        assert door.read_item(items[2], allowed) == b"\x02" * 1000


def test_an_archive_that_changes_is_opened_again(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(a=b"first"))
    item = Item("a", f"zip://a::{tmp_path}/a.zip")
    assert door.read_item(item) == b"first"
    (tmp_path / "b.zip").write_bytes(zipped(a=b"second"))
    (tmp_path / "b.zip").replace(tmp_path / "a.zip")
    assert door.read_item(item) == b"second"
