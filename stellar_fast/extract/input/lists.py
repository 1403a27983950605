"""Lists of images: lines of a text, or a column of a table."""

from __future__ import annotations

import codecs
import csv
import itertools
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from ...printable import printable
from ..footer import Group, read_footer
from ..records import Item
from .addresses import Address, Allowed, check, is_address, localized, parse, scrubbed, shown
from .door import check_stores, open_file
from .sieve import SUFFIXES, Sieve, suffix_of

# What the column of paths may be called, where a table has several.
COLUMNS = ("path", "url", "file")
MAX_LINES = 100_000_000
MAX_LINE = 64 << 10  # bytes of one path or address
MAX_TABLE = 4 << 30  # bytes of a column of paths, unpacked
MEMORY = 4 << 30  # bytes that rows of Parquet may take while they are unpacked
# Rows of Parquet that are unpacked at once: some formats of it store only where a path differs from
# the one before.
ROWS = 1024
FIRST = 1000  # rows of a CSV by which a column of numbers is told
DELTA = (5, 6, 7)  # of parquet.thrift, Encoding: what Arrow cannot read as a dictionary

Lines = Iterator[tuple[int, str]]


def read_lists(
    names: list[str],
    suffix: str,
    column: str | None,
    allowed: Allowed,
    sieve: Sieve,
    skip_duplicates: bool,
) -> list[Item]:
    """The images that lists name, in their order.

    Args:
        sieve: counts the lines that are left out.
        skip_duplicates: leave out lines that name a file again; they are an error otherwise.

    Raises:
        ValueError: a list cannot be read, names no images, one twice, or what may not be read.
        OSError: a list cannot be opened.
    """
    items: list[Item] = []
    first: dict[str, int] = {}  # where -> its place in items
    numbers: list[int] = []
    starts: list[int] = []
    lines = LISTS[suffix]

    def line_of(place: int) -> str:
        list_of = max(at for at, start in enumerate(starts) if start <= place)
        return f"{shown(names[list_of])}, line {numbers[place]}"

    for name in names:
        starts.append(len(items))
        try:
            # Tables are looked at in places; from elsewhere they are read whole first.
            file = open_file(name, allowed, whole=True)
        except FileNotFoundError as error:
            why = str(error).partition("no such file")[2]
            raise ValueError(f"{shown(name)}: no such list{why}") from None
        place = localized(name)
        own = parse(place) if is_address(place) else Address("file", place)
        number = 0
        with file:
            for number, line in lines(file, shown(name), column, own):
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"{shown(name)}: line {number} has more than {MAX_LINE} characters"
                    )
                try:
                    where, id = _locate(line, own, allowed)
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
                items.append(Item(id, where))
                if len(items) > MAX_LINES:
                    raise ValueError(f"{shown(name)}: more than the limit of {MAX_LINES} lines")
        if not number:
            raise ValueError(f"{shown(name)}: the list names no images")
        places = (item.file for item in items[starts[-1] :])
        check_stores({_store_of(place) for place in places if is_address(place)}, shown(name))
    return items


def _store_of(where: str) -> str:
    return where.rpartition("::")[2].partition("://")[0]


def _locate(line: str, own: Address, allowed: Allowed) -> tuple[str, str]:
    """Where a line of the list at `own` points, and the image's id."""
    if is_address(line):
        return check(line, allowed, local=own.local), shown(line)
    if own.protocol == "file":  # a list on this machine, as it is
        if line.startswith("~/"):
            line = os.path.expanduser(line)
        where = os.path.join(os.path.dirname(own.path), line)
        return check(line, allowed) if line.startswith("/") else _path(where, line), printable(line)
    check(line, allowed)  # how it is spelled
    return check(str(own.beside(line)), allowed, local=own.local), printable(line)


def _path(where: str, line: str) -> str:
    check(line, Allowed())  # how it is spelled
    return os.path.abspath(where)


def _text_lines(file: IO[bytes], name: str, column: str | None, own: Address) -> Lines:
    if column is not None:
        raise ValueError(f"{name}: a text list has no columns, and so no column {column!r}")
    lines = (
        (number, content.decode("utf-8", "surrogateescape"))
        for number, content in _lines(file, name)
    )
    for number, line in _stripped(lines, name):
        if line.strip():
            yield number, line


def _stripped(lines: Lines, name: str) -> Lines:
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


def _csv_lines(file: IO[bytes], name: str, column: str | None, own: Address) -> Lines:
    rows = csv.reader((line for _, line in _decoded(file, name)), strict=True)
    return _table_lines(((rows.line_num, row) for row in rows), name, column, own, ";|\t")


def _tsv_lines(file: IO[bytes], name: str, column: str | None, own: Address) -> Lines:
    """Tabs and line ends have no other meaning in a .tsv, and a quote begins nothing: a caption
    may. Only a whole field in quotes is what it holds, since many programs write all so."""
    rows = (
        (number, [_unquoted(field) for field in line.split("\t")] if line else [])
        for number, line in _stripped(_decoded(file, name), name)
    )
    return _table_lines(rows, name, column, own, ";|,")


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


Rows = Iterator[tuple[int, list[str]]]


def _table_lines(rows: Rows, name: str, column: str | None, own: Address, marks: str) -> Lines:
    """One column of a text table, whose rows all have as many.

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
        else:
            chosen = _column_name(names, name, column)
            rows, place = itertools.chain(head[1:], rows), names.index(chosen)
            values = [row[place] for _, row in head[1:] if len(row) == len(names)]
            if values and all(value.isdecimal() for value in values):
                raise ValueError(_no_paths(name, chosen, "numbers"))
        for number, row in rows:
            if len(row) != len(names):
                raise csv.Error(
                    f"line {number} has {len(row)} columns, and the first line {len(names)}; in a "
                    ".csv, fields with commas or line ends are in double quotes, and a .tsv has "
                    "no such fields"
                )
            if not row[place]:
                raise ValueError(_no_path(name, number, chosen))
            yield number, row[place]
    except csv.Error as error:
        raise ValueError(f"{name}: cannot be read as a table: {_said(error)}") from None


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


def _parquet_lines(file: IO[bytes], name: str, column: str | None, own: Address) -> Lines:
    from pyarrow import ArrowException, parquet

    try:
        groups = read_footer(file)  # before Arrow, which a damaged one may end the process of
        _check_alone(file)
    except ValueError as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {error}") from None
    try:
        names = parquet.ParquetFile(file).schema_arrow
        chosen = _column_name(names.names, name, column)
        _check_column(names.field(chosen).type, name, chosen)
        # Repeated paths are stored once, and stay so: all rows would be another matter.
        repeated = [chosen] if _check_parquet(groups, name, chosen) else None
        table = parquet.ParquetFile(file, read_dictionary=repeated)
        batches = _sparing(table.iter_batches(ROWS, columns=[chosen], use_threads=False))
        found = 0
        for number, value in _column((batch.column(0) for batch in batches), name, chosen, 1):
            yield number, value
            found = number
        # A page that is damaged may have fewer, and Arrow then gives fewer.
        if found != sum(group.rows for group in groups):
            raise OSError(f"it gives {found} of its {sum(group.rows for group in groups)} rows")
    except ValueError as error:
        if isinstance(error, ArrowException | UnicodeDecodeError):
            raise ValueError(f"{name}: cannot be read as Parquet: {_said(error)}") from None
        raise
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {_said(error)}") from None


def _check_alone(file: IO[bytes]) -> None:
    """Raises ValueError where two Parquet files follow each other: the last one's footer would be
    read, and by it the first one's pages."""
    file.seek(0)
    before = b""
    while block := file.read(1 << 20):
        if b"PAR1PAR1" in before + block:  # the end of one and the beginning of the next
            raise ValueError("several such files follow each other in it; give them one by one")
        before = block[-7:]
    file.seek(0)


def _sparing(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, each unpacked in no more than `MEMORY` beyond what the process has.

    What a page unpacks to is written nowhere that could be trusted.
    """
    earlier = resource.getrlimit(resource.RLIMIT_AS)
    while True:
        try:
            with open("/proc/self/statm", "rb") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
        except OSError:  # no Linux
            used = resource.RLIM_INFINITY
        most = used + MEMORY
        if used != resource.RLIM_INFINITY and not 0 <= earlier[0] < most:
            resource.setrlimit(resource.RLIMIT_AS, (most, earlier[1]))
        try:
            batch = next(batches, None)
        except MemoryError:
            raise OSError(f"its rows unpack to more than {MEMORY} bytes at once") from None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, earlier)
        if batch is None:
            return
        yield batch


def _check_parquet(groups: Sequence[Group], name: str, column: str) -> bool:
    """Whether the column may be read with repeated paths kept apart."""
    path = (column.encode(),)
    found = [one for group in groups for one in group.columns if one.path == path]
    rows, size = sum(group.rows for group in groups), sum(one.size for one in found)
    if size > MAX_TABLE or rows > MAX_LINES:
        raise ValueError(
            f"{name}: {rows} rows with {size} bytes of paths are more than the limits of "
            f"{MAX_LINES} and {MAX_TABLE}"
        )
    return not any(encoding in DELTA for one in found for encoding in one.encodings)


LISTS: dict[str, Callable[[IO[bytes], str, str | None, Address], Lines]] = {
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
        # A list without a first line of names has addresses there.
        known = ", ".join(shown(name)[:100] for name in columns[:20])
        raise ValueError(f"{name}: {problem} It has {known}; name one by --column")
    if columns.count(wanted) > 1:
        raise ValueError(
            f"{name}: has {columns.count(wanted)} columns {wanted!r}; rename the others"
        )
    return wanted


def _said(error: Exception) -> str:
    """What Arrow says, without the row that it repeats."""
    return scrubbed(re.sub(r"(got \d+): .*", r"\1", str(error), flags=re.DOTALL), "")[:300]


def _check_column(kind: Any, name: str, column: str) -> None:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if not any(holds(kind) for holds in _of_text(types)):
        raise ValueError(_no_paths(name, column, kind))


def _of_text(types: Any) -> tuple[Callable[[Any], bool], ...]:
    """Of Arrow's types, those that hold text, or the bytes of names that may be no UTF-8."""
    text = types.is_string, types.is_large_string, types.is_string_view
    return *text, types.is_binary, types.is_large_binary, types.is_binary_view


def _column(arrays: Iterator[Any], name: str, column: str, first: int) -> Lines:
    number = first
    for array in arrays:
        for value in map(_as_text, _values(array)):
            if not value or "\0" in value:
                raise ValueError(_no_path(name, number, column))
            yield number, value
            number += 1


def _as_text(value: str | bytes | None) -> str | None:
    return os.fsdecode(value) if isinstance(value, bytes) else value


def _no_path(name: str, number: int, column: str) -> str:
    return f"{name}: line {number} has no path in the column {printable(column)!r}"


def _no_paths(name: str, column: str, what: object) -> str:
    return (
        f"{name}: the column {printable(column)!r} holds {what}, not paths; name another by "
        "--column, or write the paths as text"
    )


def _values(array: Any) -> list[Any]:
    import pyarrow

    if not isinstance(array, pyarrow.DictionaryArray):
        return array.to_pylist()
    array.validate(full=True)  # or a damaged index would name another path, or none
    codes = array.indices.to_pylist()
    words = {code: array.dictionary[code].as_py() for code in {*codes} if code is not None}
    return [words.get(code) for code in codes]
