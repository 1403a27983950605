"""Which images to read: those of a folder, those that lists name, or the members of tars."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .layout import Item, PathLike
from .locations import address_of, expand, filesystem, is_address, localized
from .tars import read_tars

# Of the formats that images.decode reads. A list may name files with any suffix.
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
OTHER = (".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".j2k", ".avif")
PNM = (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset((*JPEG, *OTHER, *PNM))
TAR_SUFFIX = ".tar"
# What the column of paths may be called, where a table has several.
COLUMNS = ("path", "url", "file")


def discover(source: PathLike, column: str | None = None) -> list[Item]:
    """The images of a folder, of lists or of tars; whether they can be read is found out later.

    A folder is walked recursively, in sorted order of the path, for files with a suffix of
    `SUFFIXES` in any case. Hidden files and folders (a leading dot) are left out; links are
    followed, but not into a folder that they lie in.

    A list is a `.txt` file with one path a line (UTF-8, blank lines left out), or a column of a
    `.csv`, `.tsv` or `.parquet` file. Its order is kept, and relative paths count from the list's
    own folder.

    Tars are read through for the members that have a suffix of `SUFFIXES`, in their order; an id is
    `TAR::MEMBER`. Lists and tars may be several, by a pattern of `locations.expand`.

    Everything may also lie in a store that fsspec opens, such as `s3://bucket/folder`.

    Args:
        column: of a table, the one with the paths; the only one, or one of `COLUMNS`, if left out.

    Raises:
        ValueError: none of these, no image in it, or one image twice.
        OSError: the input cannot be read.
    """
    text = os.fspath(source)
    root, names = (text[: text.rfind("/") + 1], [text])
    if not os.path.lexists(text):
        root, names = expand(text)
    suffixes = {posixpath.splitext(name.partition("::")[0])[1].lower() for name in names}
    if len(suffixes) > 1 and suffixes & {TAR_SUFFIX, *LISTS}:
        raise ValueError(f"{text}: names files of several kinds, {' '.join(sorted(suffixes))}")
    suffix = suffixes.pop()
    if suffix == TAR_SUFFIX:
        items = read_tars(text, root, names, SUFFIXES)
    elif suffix in LISTS and not os.path.isdir(text):
        items = _read_lists(names, LISTS[suffix], column)
    elif len(names) > 1:
        raise ValueError(f"{text}: a pattern names tars or lists; this names {names[0]}")
    else:
        items = _read_folder(names[0])
    _check_ids(items, text)
    return items


def _check_ids(items: list[Item], source: str) -> None:
    if len({item.id for item in items}) == len(items):
        return
    seen = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{source}: two images have the name {item.id}")
        seen.add(item.id)


def _read_folder(source: str) -> list[Item]:
    if is_address(localized(source)):
        items = sorted(_find(source), key=lambda item: item.id)
    elif os.path.isdir(path := localized(source)):
        items = sorted(_walk(Path(path)), key=lambda item: item.id)
    else:
        problem = "is no folder" if os.path.exists(path) else "no such folder, list or tar"
        raise ValueError(
            f"{source}: {problem}; the input is a folder of images, a list of paths "
            f"({' '.join(LISTS)}) or a {TAR_SUFFIX} of images"
        )
    if not items:
        raise ValueError(
            f"{source}: no images in this folder; looked for {' '.join(sorted(SUFFIXES))}"
        )
    return items


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


def _find(source: str) -> Iterator[Item]:
    """The images of a folder in a store."""
    fs, root = filesystem(source)
    prefix = root.rstrip("/") + "/" if root else ""
    for path in fs.find(root):
        name = path.removeprefix(prefix)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and posixpath.splitext(name)[1].lower() in SUFFIXES:
            yield Item(name, address_of(path, source, fs))


Lines = Iterator[tuple[int, str]]


def _read_lists(
    names: list[str], lines: Callable[[Any, str, str | None], Lines], column: str | None
) -> list[Item]:
    items: list[Item] = []
    first: dict[str, str] = {}
    for name in names:
        fs, path = filesystem(name)
        try:
            file = fs.open(path, "rb")
        except FileNotFoundError:
            raise ValueError(f"{name}: no such list") from None
        folder = posixpath.dirname(path)
        before = len(items)
        with file:
            for number, line in lines(file, name, column):
                if is_address(line):
                    where = localized(line)
                elif is_address(localized(name)):
                    where = address_of(posixpath.normpath(posixpath.join(folder, line)), name, fs)
                else:
                    where = os.path.abspath(os.path.join(folder, line))
                line_of = f"{name}, line {number}"
                if where in first:
                    raise ValueError(
                        f"{first[where]} and {line_of} name the same file, {_printable(where)}; "
                        "every image may be listed once"
                    )
                first[where] = line_of
                items.append(Item(_printable(line), where))
        if len(items) == before:
            raise ValueError(f"{name}: the list names no images")
    return items


def _text_lines(file: Any, name: str, column: str | None) -> Lines:
    if column is not None:
        raise ValueError(f"{name}: a text list has no columns, and so no column {column!r}")
    text = file.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if "\0" in line:
            raise ValueError(f"{name}: line {number} holds a zero byte; this is no list of paths")
        if line.strip():
            yield number, line


def _csv_lines(file: Any, name: str, column: str | None, delimiter: str = ",") -> Lines:
    from pyarrow import ArrowException, csv

    try:
        table = csv.read_csv(file, parse_options=csv.ParseOptions(delimiter=delimiter))
    except ArrowException as error:
        raise ValueError(f"{name}: cannot be read as a table: {error}") from error
    # The first line has the names of the columns.
    return _column(table, name, _column_name(table.column_names, name, column), 2)


def _tsv_lines(file: Any, name: str, column: str | None) -> Lines:
    return _csv_lines(file, name, column, "\t")


def _parquet_lines(file: Any, name: str, column: str | None) -> Lines:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        chosen = _column_name(table.schema_arrow.names, name, column)
        content = table.read(columns=[chosen])
    except ArrowException as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {error}") from error
    return _column(content, name, chosen, 1)


LISTS = {
    ".txt": _text_lines,
    ".csv": _csv_lines,
    ".tsv": _tsv_lines,
    ".parquet": _parquet_lines,
}


def _column_name(columns: list[str], name: str, wanted: str | None) -> str:
    usual = [column for column in COLUMNS if column in columns]
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted is None and len(usual) == 1:
        return usual[0]
    if wanted is None or wanted not in columns:
        problem = "which column has the paths?" if wanted is None else f"no column {wanted!r}"
        raise ValueError(f"{name}: {problem} It has {', '.join(columns)}; name one by --column")
    return wanted


def _column(table: Any, name: str, column: str, first: int) -> Lines:
    import pyarrow

    values = table[column]
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise ValueError(f"{name}: the column {column!r} holds {values.type}, not paths")
    for number, value in enumerate(values.to_pylist(), start=first):
        if not value or "\0" in value:
            raise ValueError(f"{name}: line {number} has no path in the column {column!r}")
        yield number, value


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
