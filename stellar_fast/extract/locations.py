"""Where inputs are: local paths, and the addresses of other stores, which fsspec opens."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from ..images import describe_error

if TYPE_CHECKING:
    from .layout import Item

# The largest file that is read as one image: more than `images.MAX_PIXELS` of 16-bit RGB.
MAX_BYTES = 2 << 30

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_address(text: str) -> bool:
    """Whether `text` is fsspec's, `PROTOCOL://...` or a chain with `::`, rather than a path."""
    return "://" in text


def localized(text: str) -> str:
    """The absolute local path that `text` is or that a `file://` address names; else `text`."""
    if text.startswith("file://") and "::" not in text:
        text = text.removeprefix("file://")
    return text if is_address(text) else os.path.abspath(text)


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system of a local path or an address, and the path there.

    Raises:
        ValueError: no such protocol, or the package that it needs is missing.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except ImportError as error:  # names the package to install
        raise ValueError(f"{address}: {error}") from error


def address_of(path: str, address: str, fs: Any) -> str:
    """The address of `path` in `fs`, which `address` led to: local paths stay paths."""
    if not is_address(address):
        return path
    _, chained, rest = address.partition("::")
    return f"{fs.unstrip_protocol(path)}{chained}{rest}"


def expand(pattern: str) -> tuple[str, list[str]]:
    """What a pattern names: brace patterns as of webdataset, `{0000..0009}` and `{a,b}`, then `*`,
    `?` and `[...]`.

    Returns:
        The folder that the pattern's fixed part names, with a slash, and the addresses: in the
        order of the braces, sorted where there is a wildcard.

    Raises:
        ValueError: a wildcard that matches nothing.
    """
    wild = re.search(r"[{*?\[]", pattern)
    fixed = pattern if wild is None else pattern[: wild.start()]
    root = fixed[: fixed.rfind("/") + 1]
    found = []
    for address in _braces(pattern):
        if not re.search(r"[*?\[]", address):
            found.append(address)
            continue
        fs, path = filesystem(address)
        matches = sorted(address_of(match, address, fs) for match in fs.glob(path))
        if not matches:
            raise ValueError(f"{address}: matches no file")
        found += matches
    return root, found


def _braces(pattern: str) -> Iterator[str]:
    parts = _BRACES.split(pattern)  # texts, with what stood in braces between them
    choices = [
        [part] if index % 2 == 0 else _choices(part, pattern) for index, part in enumerate(parts)
    ]
    return map("".join, itertools.product(*choices))


def _choices(inside: str, pattern: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        if "," not in inside:
            raise ValueError(
                f"{pattern}: {{{inside}}} is neither a range, {{0000..0009}}, nor a choice, {{a,b}}"
            )
        return inside.split(",")
    first, last = span.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern}: the range {{{inside}}} is empty")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def read_item(item: Item) -> bytes:
    """The bytes of one image's file, or of its member of a tar.

    Raises:
        ImageError: they cannot be had; whatever the store raised is its reason.
    """
    try:
        content = _read_address(item) if is_address(item.file) else _read_path(item)
    except ImageError:
        raise
    except Exception as error:  # stores raise anything
        raise ImageError(item.id, describe_error(error, "read")) from error
    if item.size is not None and len(content) != item.size:
        raise ImageError(item.id, f"{len(content)} of its {item.size} bytes are in the tar")
    if not content:
        raise ImageError(item.id, "empty file")
    return content


def _read_address(item: Item) -> bytes:
    fs, path = filesystem(item.file)
    if item.offset is None:
        size = fs.size(path)
        if size is not None:  # some stores do not tell
            _check_bytes(item, size)
        return fs.cat_file(path)
    assert item.size is not None
    _check_bytes(item, item.size)
    return fs.cat_file(path, start=item.offset, end=item.offset + item.size)


def _read_path(item: Item) -> bytes:
    # Not blocking, or opening a pipe would wait for ever.
    descriptor = os.open(item.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(item.id, "is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(item.id, "is not a regular file")
        offset, size = item.offset or 0, item.size
        if size is None:
            size = status.st_size
        _check_bytes(item, size)
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(offset)
            return file.read(size)
    finally:
        os.close(descriptor)


def _check_bytes(item: Item, size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(item.id, f"{size} bytes are more than the limit of {MAX_BYTES}")
