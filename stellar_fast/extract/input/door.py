"""The one door to every input: what is opened, how much of it is read, and what is told.

No other module of the package opens an address or calls fsspec. Whatever an address is, and
wherever it came from, it is checked here when it is opened: `addresses.check` says which protocols
are read, `web` which hosts.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from ...errors import ImageError, StellarError
from ...images.reader import describe_error
from . import web
from .addresses import (
    ARCHIVES,
    LOCAL,
    STORES,
    WEB,
    Address,
    Allowed,
    check,
    expand_braces,
    is_address,
    parse,
    scrubbed,
    shown,
)
from .archives import Tar, Zip

if TYPE_CHECKING:
    from ..records import Item

# The largest file that is read as one image.
MAX_BYTES = 256 << 20
# The largest list that is not read line by line, or that is not local.
MAX_LIST_BYTES = 1 << 30
NOTHING_MORE = Allowed()


def read_item(item: Item, allowed: Allowed = NOTHING_MORE) -> bytes:
    """The bytes of one image's file, or of its member of a tar.

    Raises:
        ImageError: they cannot be had; the reason has no credentials.
    """
    try:
        where = check(item.file, allowed) if is_address(item.file) else item.file
    except ValueError as error:
        raise ImageError(item.id, str(error)) from None
    try:
        if is_address(where):
            content = _read_address(parse(where), item, allowed)
        else:
            content = _read_path(where, item.offset, item.size)
    except Exception as error:  # stores raise anything
        reason = scrubbed(describe_error(error, "read"), item.file)
        # An error of a store repeats its address; it is left out where that is no local path.
        raise ImageError(item.id, reason) from None if is_address(item.file) else error
    if item.size is not None and len(content) != item.size:
        raise ImageError(item.id, f"{len(content)} of its {item.size} bytes are in the tar")
    if not content:
        raise ImageError(item.id, "empty file")
    return content


def _read_address(address: Address, item: Item, allowed: Allowed) -> bytes:
    if item.offset is None:
        return _read_whole(address, MAX_BYTES, allowed)
    assert item.size is not None
    _check_span(item.offset, item.size)
    if address.protocol in WEB:
        return web.read_range(address, item.offset, item.size, allowed)
    if address.protocol in ARCHIVES:
        file = _open_member(address, allowed)
        file.seek(item.offset)
        return file.read(item.size)
    fs, path = _filesystem(address)
    return fs.cat_file(path, start=item.offset, end=item.offset + item.size)


def _read_path(path: str, offset: int | None, size: int | None) -> bytes:
    descriptor = _regular(path)
    try:
        if size is None:
            size = os.fstat(descriptor).st_size
        offset = offset or 0
        _check_span(offset, size)
        content = os.pread(descriptor, size, offset)
        while len(content) < size:  # of a file system that gives less at once, or the file's end
            more = os.pread(descriptor, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content
    finally:
        os.close(descriptor)


def _regular(path: str) -> int:
    """A descriptor of a file that is one: a device or a pipe could be read for ever."""
    # Not blocking, or opening a pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError("is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
    return descriptor


def _check_span(offset: int, size: int) -> None:
    if offset < 0 or size < 0:
        raise OSError(f"{size} bytes from byte {offset} on are none")
    _check_size(size, MAX_BYTES)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise OSError(f"{size} bytes are more than the limit of {limit}")


def _read_whole(address: Address, limit: int, allowed: Allowed) -> bytes:
    """The bytes of a file that is not local."""
    if address.protocol in WEB:
        return web.read(address, limit, allowed)
    if address.protocol in ARCHIVES:
        return _kept_archive(address, allowed).read(address.path, limit)
    fs, path = _filesystem(address)
    size = fs.size(path)
    if size == 0:
        return b""
    if size is not None:
        _check_size(size, limit)
        content = fs.cat_file(path, start=0, end=size)
        _check_size(len(content), size)
        return content
    with fs.open(path, "rb") as file:  # of a store that does not tell sizes
        return _read_bounded(file, limit)


def _read_bounded(file: IO[bytes], limit: int) -> bytes:
    parts = []
    left = limit + 1
    while left and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise OSError(f"more bytes than the limit of {limit}")
    return b"".join(parts)


def _filesystem(address: Address) -> tuple[Any, str]:
    """fsspec's file system of an address that `check` let through, and the path there.

    Raises:
        ValueError: no such protocol, or the package that it needs is missing.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(str(address))
    except ImportError as error:  # names the package to install
        raise ValueError(f"{shown(str(address))}: {error}") from None


def folder_in_store(where: str, allowed: Allowed) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path there, without a slash at its end.

    Raises:
        ValueError: it may not be opened, or the package that it needs is missing.
    """
    fs, path = _filesystem(parse(check(where, allowed)))
    return fs, path.rstrip("/")


def check_stores(protocols: Iterable[str], name: str) -> None:
    """Raises ValueError where the package that reads a store is missing: before any image is read.

    Args:
        name: of the list that names addresses of these protocols.
    """
    from fsspec import get_filesystem_class

    for protocol in sorted(STORES.intersection(protocols)):
        try:
            get_filesystem_class(protocol)
        except ImportError as error:
            raise ValueError(f"{name}: names {protocol}:// addresses: {error}") from None


# Lists, tars and archives


def open_file(where: str, allowed: Allowed, *, whole: bool = False) -> IO[bytes]:
    """A list or a tar, which can be read from any byte on.

    Args:
        whole: all of it will be read, and it may then not be larger than `MAX_LIST_BYTES`.

    Raises:
        ValueError: it may not be opened.
        OSError: it cannot be opened; without the credentials of its address.
    """
    where = check(where, allowed)
    with told_without_credentials(where):
        if not is_address(where):
            descriptor = _regular(where)
            if whole and (size := os.fstat(descriptor).st_size) > MAX_LIST_BYTES:
                os.close(descriptor)
                _check_size(size, MAX_LIST_BYTES)
            return open(descriptor, "rb")
        address = parse(where)
        if whole:
            return io.BytesIO(_read_whole(address, MAX_LIST_BYTES, allowed))
        if address.protocol in WEB:
            return cast(IO[bytes], web.RangeFile(address, allowed))
        if address.protocol in ARCHIVES:
            return _open_member(address, allowed)
        fs, path = _filesystem(address)
        return fs.open(path, "rb")


def open_named(where: str, allowed: Allowed, kind: str, *, whole: bool = False) -> IO[bytes]:
    """`open_file` of what the user named: where there is none, a ValueError says no such `kind`."""
    try:
        return open_file(where, allowed, whole=whole)
    except FileNotFoundError as error:
        why = str(error).partition("no such file")[2]
        raise ValueError(f"{shown(where)}: no such {kind}{why}") from None


def _open_member(address: Address, allowed: Allowed) -> IO[bytes]:
    return io.BytesIO(_kept_archive(address, allowed).read(address.path, MAX_LIST_BYTES))


class told_without_credentials:
    """Turns what a store raised into an OSError of its kind that has no credentials."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, ValueError | StellarError):
            return
        reason = scrubbed(describe_error(error, "read"), self._where)
        family = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise family(f"{shown(self._where)}: {reason}") from None


class _Kept(threading.local):
    def __init__(self) -> None:
        self.archive: tuple[object, Tar | Zip] | None = None


_KEPT = _Kept()


def _kept_archive(address: Address, allowed: Allowed) -> Tar | Zip:
    """The archive that a member is in: the last one that a thread read is kept open."""
    assert address.inner is not None
    identity: tuple[object, ...] = ()
    if address.inner.protocol in LOCAL:
        status = os.stat(address.inner.path)
        identity = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    key = address.protocol, address.inner, allowed, identity
    if _KEPT.archive is None or _KEPT.archive[0] != key:
        _KEPT.archive = None
        _KEPT.archive = key, _open_archive(address, allowed)
    return _KEPT.archive[1]


def _open_archive(address: Address, allowed: Allowed) -> Tar | Zip:
    inner = str(address.inner)
    return (Zip if address.protocol == "zip" else Tar)(open_file(inner, allowed), shown(inner))


# Folders and patterns


def find(source: str, allowed: Allowed) -> Iterator[tuple[str, str]]:
    """The files under a folder that is not local: the path in the folder, and the address.

    Raises:
        ValueError: it may not be opened, or has no listing.
        OSError: it cannot be listed.
    """
    address = parse(check(source, allowed))
    if address.protocol in WEB:
        raise ValueError(
            f"{shown(source)}: a web server has no listing of folders; the input is a list of "
            "addresses, a tar, or zip://::ADDRESS"
        )
    with told_without_credentials(source):
        if address.protocol in ARCHIVES:
            root = address.path.strip("/")
            found = _open_archive(address, allowed).names()
        else:
            fs, root = _filesystem(address)
            root = root.rstrip("/")
            found = [(path, _rest(fs.unstrip_protocol(path))) for path in fs.find(root)]
    for path, rest in found:
        if root and not path.startswith(f"{root}/"):
            continue
        yield path.removeprefix(f"{root}/" if root else ""), _whole(address, rest)


def _rest(address: str) -> str:
    return address.partition("://")[2]


def _whole(address: Address, path: str) -> str:
    """The address of another path in the same store or archive."""
    whole = str(Address(address.protocol, path, address.inner))
    if str(parse(whole)) != whole or parse(whole).path != path:
        raise ValueError(f"{shown(whole)}: has a name that no address can have")
    return whole


def expand(pattern: str, allowed: Allowed = NOTHING_MORE) -> tuple[str, list[str]]:
    """What a pattern names: brace patterns as of webdataset, `{0000..0009}` and `{a,b}`, then `*`,
    `?` and `[...]`, which a web server has not.

    Returns:
        The folder that the pattern's fixed part names, with a slash, and the addresses: in the
        order of the braces, sorted where there is a wildcard.

    Raises:
        ValueError: a wildcard that matches nothing; more names than there may be.
    """
    front, chain, back = pattern.partition("::") if is_address(pattern) else (pattern, "", "")
    on_the_web = is_address(pattern) and parse(pattern).protocol in WEB
    if on_the_web:
        front, chain, back = pattern, "", ""
    wild = re.search(r"[{?#]" if on_the_web else r"[{*?\[]", front)
    fixed = front if wild is None else front[: wild.start()]
    root = fixed[: fixed.rfind("/") + 1]
    found: list[str] = []
    for name in expand_braces(pattern):
        check(name, allowed)
        shape = name.partition("::")[0] if is_address(name) else name
        if on_the_web or not re.search(r"[*?\[]", shape):
            found.append(name)
            continue
        matches = _glob(name, allowed)
        if not matches:
            raise ValueError(f"{shown(name)}: matches no file")
        found += matches
    return f"{root}{chain}{back}", found


def _glob(pattern: str, allowed: Allowed) -> list[str]:
    if not is_address(pattern):
        return sorted(glob.glob(os.path.abspath(pattern), recursive=True))
    address = parse(check(pattern, allowed)) if not parse(pattern).local else parse(pattern)
    if address.protocol in LOCAL:
        return _glob(address.path, allowed)
    with told_without_credentials(pattern):
        if address.protocol in ARCHIVES:
            raise ValueError(f"{shown(pattern)}: no pattern is read inside an archive")
        fs, path = _filesystem(address)
        matches = sorted(fs.glob(path))
        return sorted(_whole(address, _rest(fs.unstrip_protocol(match))) for match in matches)
