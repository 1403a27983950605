"""Which images to read: those of a folder, or those named by a list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Of the formats that images.decode reads. A list may name files with any suffix.
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
OTHER = (".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".j2k", ".avif")
PNM = (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset((*JPEG, *OTHER, *PNM))
LIST_SUFFIX = ".txt"

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Item:
    """One image to read.

    Attributes:
        path: what the index calls it: relative to the input folder with forward slashes, or as the
            list's line has it. Bytes of a file name that are no UTF-8 are written as \\xNN.
        file: where it is.
    """

    path: str
    file: str


def discover(source: PathLike) -> list[Item]:
    """The images of a folder or of a list; whether they can be read is found out later.

    A folder is walked recursively, in sorted order of the path, for files with a suffix of
    `SUFFIXES` in any case. Hidden files and folders (a leading dot) are left out; links are
    followed, but not into a folder that they lie in.

    A list is a `.txt` file with one path a line, UTF-8, relative paths counted from the list's own
    folder; blank lines are left out and its order is kept.

    Raises:
        ValueError: neither of them, no image in it, or a list that names one file twice.
        OSError: the folder or the list cannot be read.
    """
    source = Path(source)
    if source.is_dir():
        items = sorted(_walk(source), key=lambda item: item.path)
        if not items:
            raise ValueError(
                f"{source}: no images in this folder; looked for {' '.join(sorted(SUFFIXES))}"
            )
        return items
    if not source.exists():
        raise ValueError(f"{source}: no such folder or list of images")
    if source.suffix.lower() != LIST_SUFFIX:
        raise ValueError(
            f"{source}: the input is a folder, or a {LIST_SUFFIX} list of paths, one a line; "
            "this is neither"
        )
    return _read_list(source)


def _walk(root: Path) -> Iterator[Item]:
    # Not os.walk, which leaves out a folder that cannot be read and circles in links to parents.
    pending: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while pending:
        folder, above = pending.pop()
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = Path(entry.path)
                if entry.is_dir():
                    pending.append((path, above | {identity}))
                elif path.suffix.lower() in SUFFIXES:
                    yield Item(_printable(path.relative_to(root).as_posix()), entry.path)


def _read_list(source: Path) -> list[Item]:
    text = source.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    items = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if "\0" in line:
            raise ValueError(f"{source}: line {number} holds a zero byte; this is no list of paths")
        file = os.path.abspath(source.parent / line)
        if file in first_line:
            raise ValueError(
                f"{source}: lines {first_line[file]} and {number} name the same file, "
                f"{_printable(file)}; every image may be listed once"
            )
        first_line[file] = number
        items.append(Item(_printable(line), file))
    if not items:
        raise ValueError(f"{source}: the list names no images")
    return items


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
