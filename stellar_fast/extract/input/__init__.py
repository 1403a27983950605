"""Which images to read: those of a folder, those that lists name, the members of tars, or the cells
of Parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ...printable import printable
from ..records import Item, PathLike
from . import door
from .addresses import Allowed, check, is_address, localized, parse, shown
from .embedded import read_embedded
from .folder import walk
from .kept import OF_ID, filled, places
from .lists import LISTS, read_lists
from .sieve import Sieve, suffix_of
from .tars import read_tars

TAR_SUFFIX = ".tar"
PARQUET_SUFFIX = ".parquet"


def discover(
    source: PathLike,
    column: str | None = None,
    allowed: Allowed | None = None,
    sieve: Sieve | None = None,
    skip_duplicates: bool = False,
    id_column: str | None = None,
    keep: Sequence[str] = (),
) -> list[Item]:
    """The images of a folder, of lists, tars or Parquet files; whether they can be read is
    found out later.

    A folder is walked recursively, in sorted order of the path, for files with a suffix of
    `sieve.SUFFIXES` in any case. Hidden files and folders (a leading dot) are left out; links are
    followed, and every folder is visited once (`folder.walk`). The same is an image in a tar.

    A list is a `.txt` file with one path a line (UTF-8, blank lines left out), or a column of a
    `.csv`, `.tsv` or `.parquet` file. Its order is kept, and relative paths count from the list's
    own folder. Only a local list may name local files.

    Tars are read through for the images in them, in their order; an id is `TAR::MEMBER`. A Parquet
    file may have images instead of paths, see `embedded`; an id is `FILE::ROW`. All of these may be
    several, by a pattern of `door.expand`.

    Everything may also lie in a store, such as `s3://bucket/folder`; which, and how much is read of
    it, is in the README of this package's parent. Ids are printable and have no credentials.

    Args:
        column: of a table, the one with the paths or images; the only one, or one of
            `table.COLUMNS` or `table.IMAGES`, if left out.
        allowed: what may be opened beyond the defaults; the input's own host, if left out.
        sieve: counts what is left out: what a folder or tars have beside their images, and lines.
        skip_duplicates: leave out lines of lists that name a file again.
        id_column: of Parquet files with images, the one with their ids.
        keep: what is carried along with each image: columns of a table or of Parquet files, what is
            beside it in a tar, or `kept.FOLDER`.

    Raises:
        ValueError: none of these, no image in it, one image twice, or an address that may not be
            opened.
        OSError: the input cannot be read.
    """
    text = os.fspath(source)
    allowed = Allowed.of(text) if allowed is None else allowed
    sieve = sieve or Sieve()
    root, names = (text[: text.rfind("/") + 1], [text])
    if is_address(text) or not os.path.lexists(text):
        root, names = door.expand(text, allowed)
        folders = {name for name in names if not is_address(name) and os.path.isdir(name)}
        if len(folders) < len(names):  # or one is the input
            names = [name for name in names if name not in folders]
            sieve.skip("folders among the files of a pattern", len(folders))
    suffixes = {_suffix(name) for name in names}
    if len(suffixes) > 1 and suffixes & {TAR_SUFFIX, *LISTS}:
        kinds = printable(" ".join(sorted(suffixes)))
        raise ValueError(f"{shown(text)}: names files of several kinds, {kinds}")
    suffix = suffixes.pop()
    embedded = None
    if suffix == PARQUET_SUFFIX and not os.path.isdir(text):
        embedded = read_embedded(text, root, names, column, id_column, allowed, keep)
    if id_column is not None and embedded is None:
        raise ValueError(
            f"{shown(text)}: an id column is of Parquet files with images in them; all else is "
            "called by its path"
        )
    if embedded is not None:
        items = embedded
    elif os.path.isdir(text):
        items = _read_folder(text, allowed, sieve, keep)
    elif suffix == TAR_SUFFIX:
        items = read_tars(text, root, names, sieve, allowed, keep)
    elif suffix in LISTS:
        items = read_lists(names, suffix, column, allowed, sieve, skip_duplicates, keep)
    elif len(names) > 1:
        raise ValueError(
            f"{shown(text)}: a pattern names tars or lists; this names {shown(names[0])}"
        )
    else:
        items = _read_folder(names[0], allowed, sieve, keep)
    _check_ids(items, text)
    return items


def _suffix(name: str) -> str:
    return suffix_of(parse(name).name if is_address(name) else name)


def _check_ids(items: list[Item], source: str) -> None:
    if len({item.id for item in items}) == len(items):
        return
    seen = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{shown(source)}: two images have the name {item.id}")
        seen.add(item.id)


def _read_folder(source: str, allowed: Allowed, sieve: Sieve, keep: Sequence[str]) -> list[Item]:
    path = localized(check(source, allowed))
    if is_address(path):
        items = sorted(_find(path, allowed, sieve), key=lambda item: item.id)
    elif os.path.isdir(path):
        items = sorted(walk(Path(path), sieve), key=lambda item: item.id)
    else:
        problem = "is no folder" if os.path.exists(path) else "no such folder, list or tar"
        raise ValueError(
            f"{shown(source)}: {problem}; the input is a folder of images, a list of paths "
            f"({' '.join(LISTS)}) or a {TAR_SUFFIX} of images"
        )
    if not items:
        tables = sieve.skipped[f"{PARQUET_SUFFIX} files"]
        remedy = f"; to read those, name them: {shown(source)}/**/*.parquet" if tables else ""
        raise ValueError(f"{shown(source)}: no images in this folder; {sieve.nothing()}{remedy}")
    values = [OF_ID for _ in places(keep, [], f"{shown(source)}: a folder has no columns")]
    return [replace(item, kept=filled(values, item.id)) for item in items] if keep else items


def _find(source: str, allowed: Allowed, sieve: Sieve) -> Iterator[Item]:
    """The images of a folder in a store."""
    for name, address in door.find(source, allowed):
        if sieve.keeps(name):
            yield Item(printable(name), address)
