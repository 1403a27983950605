"""Addresses from the web: what is refused before it is opened, however it is spelled or arrives."""

import ast
import io
import os
import socket
import zipfile
from pathlib import Path

import fsspec
import pytest
from loopback import serving
from pictures import png
from pyarrow import parquet

from stellar_fast import ImageError
from stellar_fast.extract import make_job
from stellar_fast.extract.input import discover, door, web
from stellar_fast.extract.input.addresses import READ, Allowed, check, parse
from stellar_fast.extract.records import Item

ROOT = Path(__file__).parents[2]
EXTRACT = ROOT / "stellar_fast" / "extract"


@pytest.fixture
def shut(monkeypatch):
    """Nothing may be opened through fsspec or on the web."""

    def opened(*arguments):
        raise AssertionError(f"was opened: {arguments}")

    for place, name in (
        (door, "_filesystem"),
        (web, "_dial"),
        (web, "read"),
        (web, "read_range"),
        (web, "RangeFile"),
    ):
        monkeypatch.setattr(place, name, opened)


def refuses(address: str, message: str, tmp_path: Path, allowed: Allowed | None = None) -> None:
    """As the input, as a line of a list, and in a worker that reads a foreign plan."""
    with pytest.raises(ValueError, match=message):
        discover(address, allowed=allowed)
    (tmp_path / "list.txt").write_bytes(os.fsencode(f"{address}\n"))
    with pytest.raises(ValueError, match=message):
        discover(tmp_path / "list.txt", allowed=allowed)
    for item in (Item("a", address), Item("a", address, 0, 10)):
        with pytest.raises(ImageError, match=message):
            door.read_item(item, allowed or Allowed())


# Protocols

OTHERS = sorted(set(fsspec.available_protocols()) - READ)


def test_fsspec_knows_protocols_that_are_refused():
    known = {"reference", "simplecache", "filecache", "cached", "blockcache", "dir", "github"}
    known |= {"git", "ssh", "sftp", "ftp", "smb", "webhdfs", "jupyter", "memory", "data", "generic"}
    assert known <= {*OTHERS, "generic"}


@pytest.mark.parametrize("protocol", [*OTHERS, "nosuch", "generic", "gopher", "x-y.z+1"])
def test_every_protocol_that_is_not_named_is_refused(protocol, tmp_path, shut):
    for spelled in (protocol, protocol.upper(), protocol.title()):
        for address in (
            f"{spelled}://host/a.jpg",
            f"{spelled}://",
            f"{spelled}::https://example.com/a.jpg",
            f"{spelled}://x::file:///etc/hostname",
            f"zip://a.jpg::{spelled}://host/a.zip",
            f"tar://a.jpg::{spelled}::file:///a.zip",
        ):
            named = f"{protocol.lower()}:// is not read.*--allow-protocol"
            refuses(address, named.replace("+", r"\+"), tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("zip://a.jpg", "is read as zip://MEMBER::FILE"),
        ("ZIP://a.jpg", "is read as zip://MEMBER::FILE"),
        ("zip://a::zip://b::file:///c.zip", "is read as zip"),
        ("tar://a.jpg::tar://b::https://example.com/c.tar", "is read as tar"),
        ("s3://bucket/a.jpg::file:///etc/hostname", "only zip:// and tar://"),
        ("hf://datasets/a/b::reference://x", "only zip:// and tar://"),
        ("http:///a.jpg", "names no host"),
        ("https:////a.jpg", "names no host"),
        ("http://a\\@b/x.jpg", "names no host"),
        ("http://exa mple.com/x.jpg", "names no host"),
        ("http://127.0.0.1:80:90/x.jpg", "names no host"),
        ("http://host:99999/x.jpg", "names no host"),
        ("http://%31%32%37.0.0.1/x.jpg", "names no host"),
        ("://host/x.jpg", "is no address"),
        ("a b://host/x.jpg", "is no address"),
        ("-x://host/x.jpg", "is no address"),
        ("../x/http://host/x.jpg", "is no address"),
        ("https://host/a\x1b.jpg", "is no address"),
        ("https://host/a\tb.jpg", "is no address"),
    ],
)
def test_odd_spellings_are_refused(address, message, tmp_path, shut):
    refuses(address, message, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        *("http:/host/x.jpg", "HTTPS:host/x.jpg", "file:/etc/hostname", "s3:/bucket/x.jpg"),
        *("data:image/png;base64,AAAA", "zip:a.jpg::https://example.com/a.zip"),
    ],
)
def test_addresses_without_their_slashes_are_no_paths(line, tmp_path, shut):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    for source in (line, tmp_path / "list.txt"):
        with pytest.raises(ValueError, match=r"an address has ://|is no address"):
            discover(source)
    (tmp_path / line.partition("/")[0]).write_bytes(png())
    (tmp_path / "list.txt").write_text(f"./{line.partition('/')[0]}\n")
    assert door.read_item(discover(tmp_path / "list.txt")[0]) == png()


@pytest.mark.parametrize("character", ["\n", "\r", "\0"])
def test_control_characters_from_a_table_are_refused(character, tmp_path, shut):
    import pyarrow

    for text in (f"https://host/a{character}b.jpg", f"ftp{character}://host/b.jpg"):
        parquet.write_table(pyarrow.table({"path": [text]}), tmp_path / "list.parquet")
        with pytest.raises(ValueError, match=r"is no address|no path|zero byte") as caught:
            discover(tmp_path / "list.parquet")
        assert character not in str(caught.value)
        with pytest.raises(ImageError):
            door.read_item(Item("a", text))


def test_a_protocol_is_opened_by_name_and_no_other_with_it(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/photos/a.png", png())
    allowed = Allowed.of("x", ["Memory://"], [])
    try:
        (item,) = discover("memory://photos", allowed=allowed)
        assert door.read_item(item, allowed) == png()
        refuses("ftp://host/a.png", "ftp:// is not read", tmp_path, allowed)
        refuses("memory://photos", "memory:// is not read", tmp_path, Allowed.of("x", ["ftp"]))
    finally:
        fs.store.clear()


def test_a_protocol_that_is_opened_takes_no_file_from_the_web_unchecked(tmp_path, shut):
    allowed = Allowed.of("x", ["simplecache"])
    refuses("simplecache::http://10.0.0.1/a.jpg", "without a check of hosts", tmp_path, allowed)
    refuses(
        "simplecache::zip://a.jpg::http://10.0.0.1/a.zip",
        "without a check of hosts|is read as zip",
        tmp_path,
        allowed,
    )


@pytest.mark.parametrize("name", ["", "a b", "ftp::x", "://", "f/p"])
def test_names_that_are_no_protocols_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a protocol is a name"):
        make_job(tmp_path, tmp_path / "out", allow_protocol=[name])


# Local files


@pytest.mark.parametrize("prefix", ["file://", "FILE://", "local://", "Local://", "file:////", ""])
def test_all_spellings_of_a_local_path_are_that_path(prefix, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "list.txt").write_text(f"{prefix}{tmp_path}/x/../a.png\n")
    (item,) = discover(tmp_path / "list.txt")
    assert item.file == str(tmp_path / "a.png")
    assert door.read_item(item) == png()
    assert door.read_item(Item("a", f"{prefix}{tmp_path}/a.png")) == png()


def test_only_regular_files_are_read_and_never_one_without_an_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in ("/dev/zero", "/dev/tty", tmp_path / "pipe", tmp_path / "zero.jpg"):
            for spelled in (str(path), f"local://{path}", f"FILE://{path}"):
                for span in ((), (0, 10)):
                    with pytest.raises(ImageError, match=r"not a regular file|no such device"):
                        door.read_item(Item("a", spelled, *span))
        with pytest.raises(ImageError, match="no such device"):
            door.read_item(Item("a", str(tmp_path / "socket")))
    for name in ("list.txt", "list.csv", "list.parquet", "a.tar"):
        for device in ("/dev/zero", tmp_path / "pipe"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(device)
            with pytest.raises(OSError, match=rf"{name}: is not a regular file"):
                discover(tmp_path / name)
    (tmp_path / "a.zip").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"a\.zip: is not a regular file"):
        discover(f"zip://::{tmp_path}/a.zip")
    # Regular by their mode, of no size, and some of them without an end.
    for path in ("/proc/self/environ", "/proc/self/pagemap", "/proc/kmsg"):
        if os.access(path, os.R_OK):
            with pytest.raises(ImageError):
                door.read_item(Item("a", path))


def test_no_more_than_the_limit_is_read_of_a_file_or_of_a_member(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "MAX_BYTES", 1000)
    (tmp_path / "a").write_bytes(bytes(1001))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    for item in (
        Item("a", str(tmp_path / "a")),
        Item("a", str(tmp_path / "sparse")),
        Item("a", str(tmp_path / "sparse"), 5, 1001),
    ):
        with pytest.raises(ImageError, match="more than the limit of 1000"):
            door.read_item(item)
    for offset, size in ((-1, 10), (0, -1), (-(1 << 63), 5)):
        with pytest.raises(ImageError, match="are none"):
            door.read_item(Item("a", str(tmp_path / "a"), offset, size))
    assert len(door.read_item(Item("a", str(tmp_path / "a"), 1, 1000))) == 1000


# Lists that are not local


REMOTE = ("/etc/hostname.jpg", "file:///etc/hostname", "LOCAL:///etc/hostname", "zip://a::/b.zip")


@pytest.mark.parametrize("line", REMOTE[1:])
def test_a_list_from_the_web_names_no_local_files(line, tmp_path):
    with serving({"/lists/a.txt": f"{line}\n".encode()}) as server:
        with pytest.raises(ValueError, match=r"line 1: .*a local file, named by a list"):
            discover(server.url("lists/a.txt"))
        with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
            archive.writestr("a.txt", line)
        server.answers["/a.zip"] = file.getvalue()
        with pytest.raises(ValueError, match=r"line 1: .*a local file, named by a list"):
            discover(f"zip://a.txt::{server.url('a.zip')}")
    (tmp_path / "a.txt").write_text(f"{line}\n")
    assert len(discover(tmp_path / "a.txt")) == 1


def test_paths_in_a_list_from_the_web_count_from_there(tmp_path):
    lines = "b.jpg\n../c d.jpg\n/e%.jpg\n../../../f.jpg\n//g.jpg\nh\u00e9.jpg\ni.jpg?j=1&k=2\n"
    with serving({"/x/lists/a.txt": lines.encode()}) as server:
        allowed = Allowed.of(server.url())
        items = discover(server.url("x/lists/a.txt?token=secret"))
        for item in items:
            with pytest.raises(ImageError, match="no such file"):
                door.read_item(item, allowed)
        assert server.paths[1:] == [
            *("/x/lists/b.jpg", "/x/c%20d.jpg", "/e%25.jpg", "/f.jpg", "//g.jpg"),
            *("/x/lists/h%C3%A9.jpg", "/x/lists/i.jpg?j=1&k=2"),
        ]
        assert [item.id for item in items] == lines.splitlines()


# The house


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_no_other_module_opens_an_address():
    """fsspec in the door alone, and what speaks to hosts in the one module that checks them."""
    clients = {
        "http",
        "urllib",
        "socket",
        "ssl",
        "requests",
        "httpx",
        "aiohttp",
        "urllib3",
        "ftplib",
    }
    for path in sorted((ROOT / "stellar_fast").rglob("*.py")):
        name = path.relative_to(EXTRACT).as_posix() if path.is_relative_to(EXTRACT) else ""
        found = imported(path)
        if any(module.split(".")[0] == "fsspec" for module in found):
            assert name == "input/door.py", path
        if not name:
            continue
        used = {module for module in found if module.split(".")[0] in clients}
        if not all(module.startswith("urllib.parse") for module in used - {"urllib"}):
            assert name == "input/web.py", (path, used)
        if any(module.strip(".").split(".")[-1] == "web" for module in found):
            assert name == "input/door.py", path


def test_every_protocol_that_is_read_is_one_of_these():
    assert sorted(READ) == [
        *("abfs", "abfss", "az", "file", "gcs", "gs", "hf", "http", "https", "local", "s3", "s3a"),
        *("tar", "zip"),
    ]
    for protocol in READ - {"zip", "tar"}:
        check(f"{protocol}://host/x", Allowed())
        check(f"zip://x::{protocol.upper()}://host/x", Allowed())
        assert parse(f"{protocol.upper()}://host/x").protocol in (protocol, "file")
