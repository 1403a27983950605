"""Lists of images: lines of a text, or a column of a table."""

from __future__ import annotations

import codecs
import csv
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from ..records import Item
from .addresses import Address, Allowed, address_of, is_address, locate, shown
from .door import check_stores, open_named
from .kept import OF_ID, Budget, filled, numbers_of, places
from .parquet_column import parquet_lines
from .sieve import SUFFIXES, Sieve, suffix_of
from .table import COLUMNS, MAX_LINE, MAX_LINES, Lines, column_name, no_path, no_paths, said

FIRST = 1000  # rows of a CSV by which a column of numbers is told

Numbered = Iterator[tuple[int, str]]
Rows = Iterator[tuple[int, list[str]]]


def read_lists(
    names: list[str],
    suffix: str,
    column: str | None,
    allowed: Allowed,
    sieve: Sieve,
    skip_duplicates: bool,
    keep: Sequence[str] = (),
) -> list[Item]:
    """The images that lists name, in their order.

    Args:
        sieve: counts the lines that are left out.
        skip_duplicates: leave out lines that name a file again; they are an error otherwise.
        keep: columns whose values are carried along.

    Raises:
        ValueError: a list cannot be read, names no images, one twice, or what may not be read.
        OSError: a list cannot be opened.
    """
    items: list[Item] = []
    first: dict[str, int] = {}  # where -> its place in items
    numbers: list[int] = []
    starts: list[int] = []
    lines, budget = LISTS[suffix], Budget()

    def line_of(place: int) -> str:
        list_of = max(at for at, start in enumerate(starts) if start <= place)
        return f"{shown(names[list_of])}, line {numbers[place]}"

    for name in names:
        starts.append(len(items))
        own = address_of(name)
        number = 0
        # Tables are looked at in places; from elsewhere they are read whole first.
        with open_named(name, allowed, "list", whole=True) as file:
            for number, line, values in lines(file, shown(name), column, own, keep):
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"{shown(name)}: line {number} has more than {MAX_LINE} characters"
                    )
                try:
                    where, id = locate(line, own, allowed)
                except ValueError as error:
                    raise ValueError(f"{shown(name)}, line {number}: {error}") from None
                if where in first and skip_duplicates:
                    sieve.skip("lines that name a file again")
                    continue
                numbers.append(number)
                if where in first:
                    raise ValueError(
                        f"{line_of(first[where])} and {line_of(len(items))} name the same file, "
                        f"{shown(where)}; every image may be listed once, or --skip-duplicates"
                    )
                first[where] = len(items)
                kept = filled(values, id)
                budget.take(kept, f"{shown(name)}, line {number}")
                items.append(Item(id, where, kept=kept))
                if len(items) > MAX_LINES:
                    raise ValueError(f"{shown(name)}: more than the limit of {MAX_LINES} lines")
        if not number:
            raise ValueError(f"{shown(name)}: the list names no images")
        stores = {_store_of(item.file) for item in items[starts[-1] :] if is_address(item.file)}
        check_stores(stores, shown(name))
    return numbers_of(items, keep) if suffix in (".csv", ".tsv") and keep else items


def _store_of(where: str) -> str:
    return where.rpartition("::")[2].partition("://")[0]


def _text_lines(
    file: IO[bytes], name: str, column: str | None, own: Address, keep: Sequence[str]
) -> Lines:
    if column is not None:
        raise ValueError(f"{name}: a text list has no columns, and so no column {column!r}")
    places(keep, [], f"{name}: a text list has no columns")
    lines = (
        (number, content.decode("utf-8", "surrogateescape"))
        for number, content in _lines(file, name)
    )
    for number, line in _stripped(lines, name):
        if line.strip():
            yield number, line, [OF_ID for _ in keep]


def _stripped(lines: Numbered, name: str) -> Numbered:
    """Lines without their ends."""
    for number, line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if "\r" in line:
            raise ValueError(
                f"{name}: line {number} holds a carriage return; lines end by \\n or \\r\\n"
            )
        yield number, line


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a text by their number, without the mark of UTF-8."""
    number = 0
    while content := file.readline(MAX_LINE + 1):
        number += 1
        if len(content) > MAX_LINE:
            raise ValueError(f"{name}: line {number} has more than {MAX_LINE} bytes")
        if number == 1:
            content = content.removeprefix(codecs.BOM_UTF8)
            if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{name}: is UTF-16; save it as UTF-8")
        if b"\0" in content:
            raise ValueError(
                f"{name}: line {number} holds a zero byte; this is no list of paths, or one in "
                "UTF-16: save it as UTF-8"
            )
        yield number, content


def _csv_lines(
    file: IO[bytes], name: str, column: str | None, own: Address, keep: Sequence[str]
) -> Lines:
    rows = csv.reader((line for _, line in _decoded(file, name)), strict=True)
    return _table_lines(((rows.line_num, row) for row in rows), name, column, own, keep, ";|\t")


def _tsv_lines(
    file: IO[bytes], name: str, column: str | None, own: Address, keep: Sequence[str]
) -> Lines:
    """Tabs and line ends have no other meaning in a .tsv, and a quote begins nothing: a caption
    may. Only a whole field in quotes is what it holds, since many programs write all so."""
    rows = (
        (number, [_unquoted(field) for field in line.split("\t")] if line else [])
        for number, line in _stripped(_decoded(file, name), name)
    )
    return _table_lines(rows, name, column, own, keep, ";|,")


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    if len(field) < 2 or not field.startswith('"') or not field.endswith('"') or '"' in inner:
        return field
    return field[1:-1].replace('""', '"')


def _decoded(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    for number, content in _lines(file, name):
        try:
            yield number, content.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{name}: line {number} is no UTF-8; save it as UTF-8") from None


def _table_lines(
    rows: Rows, name: str, column: str | None, own: Address, keep: Sequence[str], marks: str
) -> Lines:
    """One column and what is kept of a text table, whose rows all have as many.

    Args:
        marks: what separates columns elsewhere, and not in tables of this kind.
    """
    try:
        rows = (row for row in rows if row[1])  # all but empty lines
        head = list(itertools.islice(rows, 1 + FIRST))
        if not head:
            raise csv.Error("it has no names of columns")
        names = head[0][1]
        if _is_row(head, name, own, marks):
            rows, place, chosen = itertools.chain(head, rows), 0, ""
            kept = places(keep, [], f"{name}: its first line has no names of columns")
        else:
            chosen = column_name(names, name, column)
            rows, place = itertools.chain(head[1:], rows), names.index(chosen)
            kept = places(keep, names, name)
            values = [row[place] for _, row in head[1:] if len(row) == len(names)]
            if values and all(value.isdecimal() for value in values):
                raise ValueError(no_paths(name, chosen, "numbers"))
        for number, row in rows:
            if len(row) != len(names):
                raise csv.Error(
                    f"line {number} has {len(row)} columns, and the first line {len(names)}; in a "
                    ".csv, fields with commas or line ends are in double quotes, and a .tsv has "
                    "no such fields"
                )
            if not row[place]:
                raise ValueError(no_path(name, number, chosen))
            # An empty field is no value.
            yield number, row[place], [OF_ID if at is None else row[at] or None for at in kept]
    except csv.Error as error:
        raise ValueError(f"{name}: cannot be read as a table: {said(error)}") from None


def _is_row(head: list[tuple[int, list[str]]], name: str, own: Address, marks: str) -> bool:
    """Whether the first row of a table is an image, and no names of columns.

    Raises:
        ValueError: it is among other columns, or columns are separated otherwise.
    """
    first = head[0][1]
    path = next(
        (field for field in first if is_address(field) or suffix_of(field) in SUFFIXES), None
    )
    if len(first) > 1:
        if path is not None:
            raise ValueError(
                f"{name}: the first line has {shown(path)[:100]}, a path, and no names of columns; "
                "put a line of names before it, such as path"
            )
        return False
    (only,) = first
    second = head[1][1][0] if len(head) > 1 and head[1][1] else ""
    for mark in marks:
        if only.count(mark) and only.count(mark) == second.count(mark):
            raise ValueError(
                f"{name}: its columns are separated by {mark!r}; they are by commas in a .csv, and "
                "by tabs in a .tsv"
            )
    numbered = not only.isdecimal() and _numbered(only) == _numbered(second)
    if path is not None or "/" in only or (numbered and only != second):
        return True
    beside = os.path.join(os.path.dirname(own.path), only)
    return own.protocol == "file" and only not in COLUMNS and os.path.isfile(beside)


def _numbered(text: str) -> str:
    """What numbered names have in common."""
    return re.sub(r"\d+", "0", text)


LISTS: dict[str, Callable[[IO[bytes], str, str | None, Address, Sequence[str]], Lines]] = {
    ".txt": _text_lines,
    ".csv": _csv_lines,
    ".tsv": _tsv_lines,
    ".parquet": parquet_lines,
}
