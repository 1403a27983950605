"""Parquet files with images in them: which column has them, and their rows.

A column of images is a struct with the field `bytes`, as the `datasets` library writes it, or one
of binary cells that are image files. A binary column may as well hold paths, which are names of
files and need be no text; the two are told apart by the bytes of the first cells that are not null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, Any

from ...printable import printable
from ..footer import Group, read_footer, unaccounted
from ..records import Item
from .addresses import Allowed, label, places_of, shown
from .door import open_file, open_named
from .kept import FOLDER, Budget
from .parquet_column import check_alone, kept_columns, rows_of, sparing
from .table import COLUMNS, IMAGES, MAX_LINE, MAX_LINES, column_name, said

THREADS = 8  # files whose footers are read at once
PROBED = 8  # cells by which images and paths are told apart
PROBED_ROWS = 10_000  # in which so many are looked for
# Rows that a file may have and not a byte for each.
FREE_ROWS = 1 << 20
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
)


@dataclass(frozen=True)
class _Table:
    """One file: where it is, its row groups, its schema."""

    place: str
    groups: list[Group]
    schema: Any


def read_embedded(
    source: str,
    root: str,
    names: list[str],
    column: str | None,
    id_column: str | None,
    allowed: Allowed,
    keep: Sequence[str] = (),
) -> list[Item] | None:
    """The images in Parquet files, in the order of the files and of their rows; None where the
    files are lists of paths.

    Whether a row has an image is found out when it is read.

    Args:
        root: the folder that the ids count the files' names from.
        column: the one with the images; one of `IMAGES`, or the only one, if left out.
        id_column: the one with the ids, of text or integers; `FILE::ROW`, if left out.
        keep: columns whose values are carried along.

    Raises:
        ValueError: a file cannot be read, it cannot be told which column has the images or what it
            holds, or the files differ in that.
        OSError: a file cannot be opened.
    """
    places = places_of(names, source)
    with ThreadPoolExecutor(THREADS) as pool:
        tables = list(pool.map(partial(_read_table, allowed), places))
    chosen: str | None = None
    items: list[Item] = []
    budget = Budget()
    for table in tables:
        name = shown(table.place)
        found = _image_column(table, name, chosen or column, allowed)
        if table is not tables[0] and found != chosen:
            holds = "paths" if found is None else "images"
            raise ValueError(
                f"{name}: holds {holds} in place of what {shown(tables[0].place)} holds; give "
                "files of one kind"
            )
        chosen = found
        if chosen is None:
            continue
        if len(items) + sum(group.rows for group in table.groups) > MAX_LINES:
            raise ValueError(f"{name}: more than the limit of {MAX_LINES} rows")
        _check_file(table, name, allowed)
        items += _items(table, label(table.place, root), chosen, id_column, keep, budget, allowed)
    if chosen is None:
        return None
    if not items:
        raise ValueError(f"{shown(source)}: has no rows, and so no images")
    return items


def _read_table(allowed: Allowed, place: str) -> _Table:
    from pyarrow import ArrowException, parquet

    with open_named(place, allowed, "list") as file:
        try:
            groups = read_footer(file)  # before Arrow, which a damaged one may end the process of
            return _Table(place, groups, parquet.ParquetFile(file).schema_arrow)
        except (ValueError, ArrowException, OSError) as error:
            raise ValueError(f"{shown(place)}: cannot be read as Parquet: {said(error)}") from None


def _check_file(table: _Table, name: str, allowed: Allowed) -> None:
    """Raises ValueError where a file cannot have the rows that it says, or is several."""
    with open_file(table.place, allowed) as file:
        try:
            check_footer(table.groups, file.seek(0, 2))
            if unaccounted(file, table.groups) > 0:
                check_alone(file)
        except ValueError as error:
            raise ValueError(f"{name}: cannot be read as Parquet: {error}") from None


def check_footer(groups: list[Group], length: int) -> None:
    """
    Raises:
        ValueError: a file of `length` bytes cannot have images in these row groups.
    """
    rows = sum(group.rows for group in groups)
    if rows > max(FREE_ROWS, length):
        raise ValueError(f"it says that {rows} rows are in its {length} bytes")
    for group in groups:
        for one in group.columns:
            if min(one.start, one.packed) < 0 or one.start + one.packed > length:
                raise ValueError(f"a column is beyond its {length} bytes")


def _image_column(table: _Table, name: str, wanted: str | None, allowed: Allowed) -> str | None:
    """The column with the images; None where the table is a list of paths."""
    columns: list[str] = table.schema.names
    structs = [field.name for field in table.schema if _is_struct(field.type)]
    binary = [field.name for field in table.schema if _is_binary(field.type)]
    if wanted is not None or len(columns) == 1:
        found = [column_name(columns, name, wanted)]
    else:
        paths = [column for column in COLUMNS if column in columns]
        found = [column for column in IMAGES if column in (*structs, *binary)]
        if not found and structs and paths:
            raise ValueError(
                f"{name}: are the images in {_listed(structs)}, or their paths in "
                f"{_listed(paths)}? Name one by --column"
            )
        # Of another name, it may be sound or video.
        found = found or [column for column in structs if _has_images(table, name, column, allowed)]
    if len(found) > 1:
        raise ValueError(
            f"{name}: which column has the images? It has {_listed(found)}; name one by --column"
        )
    for column in found:
        if column in structs or (column in binary and _holds_images(table, name, column, allowed)):
            return column_name(columns, name, column)
    return None


def _listed(columns: list[str]) -> str:
    return ", ".join(printable(column)[:100] for column in columns[:20])


def _is_struct(kind: Any) -> bool:
    """Whether a type is a struct of an image file's bytes, and perhaps its path."""
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
    return "bytes" in fields and _is_binary(fields["bytes"])


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _holds_images(table: _Table, name: str, column: str, allowed: Allowed) -> bool:
    """Whether a binary column holds images, and no paths."""
    cells = _first_cells(table, name, column, allowed)
    if cells and all(map(is_image, cells)):
        return True
    if all(map(_is_path, cells)):  # of no cells, too: what a list says of them
        return False
    strange = next((cell for cell in cells if not (is_image(cell) or _is_path(cell))), None)
    what = "both images and paths"
    if strange is not None:
        start = f"a cell of {len(strange)} bytes begins with {strange[:12]!r}"
        what = f"neither images nor paths: {start}"
    raise ValueError(
        f"{name}: the column {printable(column)!r} holds {what}; name another by --column"
    )


def _has_images(table: _Table, name: str, column: str, allowed: Allowed) -> bool:
    """Whether a struct has images in its bytes, or nothing in the first rows."""
    cells = _first_cells(table, name, f"{column}.bytes", allowed)
    return not cells or any(map(is_image, cells))


def _first_cells(table: _Table, name: str, column: str, allowed: Allowed) -> list[bytes]:
    """The first cells of a binary column, or of the field of a struct, that are not null."""
    from pyarrow import ArrowException, parquet

    cells: list[bytes] = []
    try:
        with open_file(table.place, allowed) as file:
            found = parquet.ParquetFile(file, buffer_size=1 << 20)
            batches = found.iter_batches(1, columns=[column], use_threads=False)
            for batch in islice(sparing(batches), PROBED_ROWS):
                own = column in batch.schema.names
                (cell,) = (batch[column] if own else batch.column(0)).to_pylist()
                cell = cell["bytes"] if isinstance(cell, dict) else cell
                cells += [] if cell is None else [cell]
                if len(cells) == PROBED:
                    break
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {said(error)}") from None
    return cells


def is_image(cell: bytes) -> bool:
    """Whether bytes begin as an image file does, of the formats that are read."""
    head = cell[:128]
    if head.startswith(_SIGNATURES):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"avis", b"mif1")
    if head[:2] == b"BM":
        return head[6:10] == bytes(4)
    # As a name may begin, but without a line end.
    netpbm = head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3].isspace()
    return netpbm and b"\n" in head


def _is_path(cell: bytes) -> bool:
    return 0 < len(cell) <= MAX_LINE and not any(end in cell for end in (b"\0", b"\n", b"\r"))


def _items(
    table: _Table,
    label: str,
    column: str,
    id_column: str | None,
    keep: Sequence[str],
    budget: Budget,
    allowed: Allowed,
) -> Iterator[Item]:
    name = shown(table.place)
    if FOLDER in keep and FOLDER not in table.schema.names:
        raise ValueError(f"{name}: no column {FOLDER!r} to keep, and rows are in no folder")
    columns = kept_columns(table.schema, name, keep)
    if id_column is not None:
        column_name(table.schema.names, name, id_column)
        _check_ids(table.schema.field(id_column).type, name, id_column)
        columns.append(id_column)
    with open_file(table.place, allowed) as file:
        values = _values(file, table, name, columns)
        number = 0
        for at, group in enumerate(table.groups):
            for row in range(group.rows):
                kept = next(values, None)
                if kept is None:
                    raise ValueError(f"{name}: cannot be read as Parquet: it ends at row {number}")
                id = f"{label}::{number}"
                if id_column is not None and (id := kept.pop()) in (None, ""):
                    raise ValueError(
                        f"{name}: row {number} has no id in the column {printable(id_column)!r}"
                    )
                budget.take(kept, f"{name}, row {number}")
                id = printable(str(id))
                yield Item(id, table.place, None, None, column, at, row, tuple(kept))
                number += 1


def _values(file: IO[bytes], table: _Table, name: str, columns: list[str]) -> Iterator[list[Any]]:
    """The values of some columns, row by row."""
    from pyarrow import ArrowException

    if not columns:
        yield from ([] for _ in range(sum(group.rows for group in table.groups)))
        return
    try:
        yield from rows_of(file, table.groups, name, columns)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {said(error)}") from None


def _check_ids(kind: Any, name: str, column: str) -> None:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not (text or types.is_integer(kind)):
        raise ValueError(
            f"{name}: the column {printable(column)!r} holds {kind}, and ids are text or integers"
        )
