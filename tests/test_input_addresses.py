"""Addresses from the web: what is refused before it is opened, however it is spelled or arrives."""

import ast
import io
import json
import os
import pickle
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from engines import small_engine
from extracting import index, load_small, touch
from loopback import redirect, serving
from pictures import photograph
from pyarrow import parquet

from stellar_fast import ImageError, StellarError
from stellar_fast.extract import discover, identify, plan, prepare, read_plan, run, run_devices
from stellar_fast.extract.input import door, web
from stellar_fast.extract.input.addresses import READ, Allowed, check, parse
from stellar_fast.extract.layout import PLAN, digest_of, read_items, write_plan
from stellar_fast.extract.records import Item

ROOT = Path(__file__).parent.parent
EXTRACT = ROOT / "stellar_fast" / "extract"


@pytest.fixture(scope="module")
def engine():
    return small_engine()


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


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    photograph(40, 30, seed=seed).save(file, "PNG")
    return file.getvalue()


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
        plan(tmp_path, tmp_path / "out", allow_protocols=[name])


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


# Hosts

PRIVATE = (
    *("127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1"),
    *("::1", "::", "fe80::1", "fe80::1%lo", "fd00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1"),
    *("::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:db8::1", "2001:0:7f00:1::", "64:ff9b:1::1"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks_are_not_public(address):
    assert not web.is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_the_internet_is_public(address):
    assert web.is_public(address)


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "[::1]"],
)
def test_a_line_leads_to_no_private_host_however_it_is_spelled(host, tmp_path):
    with serving({"/a.png": png()}) as server:
        (tmp_path / "list.txt").write_text(f"http://{host}:{server.port}/a.png\n")
        (item,) = discover(tmp_path / "list.txt")
        with pytest.raises(
            ImageError, match=r"in a private network; --allow-host|has no address|refused"
        ):
            door.read_item(item)
        assert server.requests == []
        if "::" not in host:
            for text in (host, f"{host}:{server.port}"):
                assert door.read_item(item, Allowed.of("x", (), [text])) == png()
        for other in ("10.0.0.1", f"127.0.0.1:{server.port + 1}", "example.com"):
            with pytest.raises(ImageError, match="in a private network"):
                door.read_item(item, Allowed.of("x", (), [other]))


def test_the_hosts_name_is_looked_up_once_and_that_address_is_checked(monkeypatch):
    """A name that is public when it is asked for first, and private when it is connected to."""
    with serving({"/a.png": png()}) as server:
        asked = []

        def rebinding(host, port, **arguments):
            asked.append(host)
            address = "93.184.215.14" if len(asked) > 1 else "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        item = Item("a", f"http://public.example:{server.port}/a.png")
        with pytest.raises(ImageError, match=r"public\.example is at 127\.0\.0\.1"):
            door.read_item(item)
        assert asked == ["public.example"]
        assert server.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_leads_to_no_private_host(status):
    with serving({"/secret": png()}) as inner, serving({}) as outer:
        outer.answers["/a.png"] = redirect(inner.url("secret"))
        allowed = Allowed.of(outer.url())
        for address in (outer.url("a.png"), f"zip://x::{outer.url('a.png')}"):
            for span in ((), (0, 10)):
                with pytest.raises(ImageError, match="in a private network"):
                    door.read_item(Item("a", address, *span), allowed)
        assert inner.requests == []
        both = Allowed.of(outer.url(), (), [inner.host])
        assert door.read_item(Item("a", outer.url("a.png")), both) == png()


@pytest.mark.parametrize(
    "where",
    ["file:///etc/hostname", "ftp://h/x", "http://", "http://a:b:c/", "//", "gopher://x", "\x00"],
)
def test_a_redirect_leads_nowhere_else(where):
    with (
        serving({"/a.png": redirect(where)}) as server,
        pytest.raises(ImageError, match=r"redirects (to what is no address|more than 5 times)"),
    ):
        door.read_item(Item("a", server.url("a.png")), Allowed.of(server.url()))


def test_redirects_end(monkeypatch):
    with serving({"/a": redirect("/a")}) as server:
        with pytest.raises(ImageError, match="redirects more than 5 times"):
            door.read_item(Item("a", server.url("a")), Allowed.of(server.url()))
        assert len(server.requests) == 6
        server.answers |= {"/b": redirect("c?x=1"), "/c": png()}
        assert door.read_item(Item("a", server.url("b")), Allowed.of(server.url())) == png()
        assert server.paths[-1] == "/c?x=1"


@pytest.mark.parametrize("text", ["", "a b", "http://x", "x:y", "x:99999", "u@x", "x/y", ":80"])
def test_texts_that_are_no_hosts_are_refused(text):
    with pytest.raises(ValueError, match="a host is HOST or HOST:PORT"):
        Allowed.of("x", (), [text])


def test_hosts_are_taken_apart():
    hosts = ["NAS", "nas:80", "[::1]:80", "fd00::2"]
    assert Allowed.of("https://u:p@[::9]/x", (), hosts).hosts == {
        *(("nas", None), ("nas", 80), ("::1", 80), ("fd00::2", None), ("::9", 443))
    }


# Through a whole extraction


def test_what_is_allowed_travels_to_the_decoding_processes(tmp_path, engine):
    images = {f"/{n}.png": png(n) for n in range(3)}
    with serving(images) as inner, serving({}) as outer:
        lines = [outer.url("0.png"), inner.url("1.png"), "2.png"]
        outer.answers |= {"/list.txt": "\n".join(lines).encode(), **images}
        run(plan(outer.url("list.txt"), tmp_path / "out"), engine)
        first, second, third = index(tmp_path / "out")["reason"]
        assert first is third is None
        assert "--allow-host 127.0.0.1" in second
        job = plan(outer.url("list.txt"), tmp_path / "both", allow_hosts=[inner.host])
        assert pickle.loads(pickle.dumps(job)).options.allowed == job.options.allowed
        run_devices(job, load_small, ["cpu", "cpu"])
        assert index(tmp_path / "both")["reason"] == [None] * 3


def test_foreign_plans_open_nothing_that_is_not_allowed(tmp_path, engine):
    """The lines of an output folder from elsewhere, with all digests as they should be."""
    photos = tmp_path / "photos"
    for name in "ab":
        touch(photos, f"{name}.png")
        (photos / f"{name}.png").write_bytes(png(ord(name)))
    output = tmp_path / "out"
    prepare(plan(photos, output), identify(engine), 16)
    made = read_plan(output)
    items = read_items(output, made.partitions[0])
    with serving({"/x.json": b"{}", "/x.png": png()}) as server:
        hostile = [
            Item(items[0].id, f"reference://x.png::{server.url('x.json')}"),
            Item(items[1].id, server.url("x.png")),
        ]
        other = tmp_path / "other"
        other.mkdir()
        facts = json.loads((output / PLAN).read_text())
        facts["partitions"][0]["digest"] = digest_of(hostile)
        changed = type(made)(
            made.configuration,
            (type(made.partitions[0])(0, 2, digest_of(hostile)),),
            made.facts,
        )
        write_plan(other, changed, hostile)
        run(plan(photos, other, resume=True), engine)
        reasons = index(other)["reason"]
        assert "reference:// is not read" in reasons[0]
        assert "in a private network" in reasons[1]
        assert server.requests == []
        # The same lines under the digests of the plan: refused before anything is read.
        shutil.copy(other / "inputs.parquet", output / "inputs.parquet")
        with pytest.raises(StellarError, match="names other images than"):
            run(plan(photos, output, resume=True), engine)


@pytest.mark.parametrize(
    "change",
    [{"file": "/etc/hostname"}, {"offset": 1}, {"size": 4}, {"id": "z.png"}],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_covers_all_that_is_read(change, tmp_path, engine):
    from dataclasses import replace

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(png())
        tar.addfile(member, io.BytesIO(png()))
    job = plan(tmp_path / "a.tar", tmp_path / "out")
    made = prepare(job, identify(engine), 16)
    write_plan(tmp_path / "out", made, [replace(job.items[0], **change)])
    with pytest.raises(StellarError, match="names other images than"):
        read_items(tmp_path / "out", made.partitions[0])


def test_plans_of_before_are_refused_with_what_to_do(tmp_path, engine):
    touch(tmp_path / "in", "a.png")
    output = tmp_path / "out"
    prepare(plan(tmp_path / "in", output), identify(engine), 16)
    content = json.loads((output / PLAN).read_text())
    (output / PLAN).write_text(json.dumps(content | {"schema": 1}))
    with pytest.raises(StellarError, match=r"schema 1.*--overwrite"):
        plan(tmp_path / "in", output)
    run(plan(tmp_path / "in", output, overwrite=True), engine)


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
