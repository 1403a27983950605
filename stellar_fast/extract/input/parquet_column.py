"""A column of a Parquet file, read in bounded memory whatever the file says of itself."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from ...printable import printable
from ..footer import Group, read_footer
from .addresses import Address
from .kept import OF_ID, places
from .table import MAX_LINES, Lines, column_name, no_path, no_paths, said

MAX_TABLE = 4 << 30  # bytes of a column of paths, unpacked
MEMORY = 4 << 30  # bytes that rows of Parquet may take while they are unpacked
# Rows of Parquet that are unpacked at once: some formats of it store only where a path differs from
# the one before.
ROWS = 1024
DELTA = (5, 6, 7)  # of parquet.thrift, Encoding: what Arrow cannot read as a dictionary


def parquet_lines(
    file: IO[bytes], name: str, column: str | None, own: Address, keep: Sequence[str]
) -> Lines:
    from pyarrow import ArrowException, parquet

    try:
        groups = read_footer(file)  # before Arrow, which a damaged one may end the process of
        check_alone(file)
    except ValueError as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {error}") from None
    try:
        names = parquet.ParquetFile(file).schema_arrow
        chosen = column_name(names.names, name, column)
        _check_type(names.field(chosen).type, name, chosen)
        kept = kept_columns(names, name, keep)
        found = 0
        for value, *values in rows_of(file, groups, name, [chosen, *kept]):
            path = os.fsdecode(value) if isinstance(value, bytes) else value
            if not path or "\0" in path:
                raise ValueError(no_path(name, found + 1, chosen))
            found += 1
            yield found, path, [values.pop(0) if one in kept else OF_ID for one in keep]
        # A page that is damaged may have fewer, and Arrow then gives fewer.
        if found != sum(group.rows for group in groups):
            raise OSError(f"it gives {found} of its {sum(group.rows for group in groups)} rows")
    except ValueError as error:
        if isinstance(error, ArrowException | UnicodeDecodeError):
            raise ValueError(f"{name}: cannot be read as Parquet: {said(error)}") from None
        raise
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet: {said(error)}") from None


def check_alone(file: IO[bytes]) -> None:
    """Raises ValueError where two Parquet files follow each other: the last one's footer would be
    read, and by it the first one's pages."""
    file.seek(0)
    before = b""
    while block := file.read(1 << 20):
        if b"PAR1PAR1" in before + block:  # the end of one and the beginning of the next
            raise ValueError("several such files follow each other in it; give them one by one")
        before = block[-7:]
    file.seek(0)


def sparing(batches: Iterator[Any]) -> Iterator[Any]:
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


def check_column(groups: Sequence[Group], name: str, column: str) -> bool:
    """Whether a column of text may be read with repeated values kept apart.

    Raises:
        ValueError: it is too long.
    """
    path = (column.encode(),)
    found = [one for group in groups for one in group.columns if one.path == path]
    rows, size = sum(group.rows for group in groups), sum(one.size for one in found)
    if size > MAX_TABLE or rows > MAX_LINES:
        raise ValueError(
            f"{name}: {rows} rows with {size} bytes of text are more than the limits of "
            f"{MAX_LINES} and {MAX_TABLE}"
        )
    return not any(encoding in DELTA for one in found for encoding in one.encodings)


def kept_columns(schema: Any, name: str, keep: Sequence[str]) -> list[str]:
    """Which columns have what is kept; the image's folder has none.

    Raises:
        ValueError: a column is missing, or holds what is not kept.
    """
    from pyarrow import types

    columns: list[str] = schema.names
    found = [columns[place] for place in places(keep, columns, name) if place is not None]
    for column in found:
        kind = schema.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        single = types.is_integer, types.is_floating, types.is_boolean, types.is_null
        if not any(holds(kind) for holds in (*single, *_of_text(types)[:3])):
            raise ValueError(
                f"{name}: the column {printable(column)!r} holds {kind}; integers, floats, "
                "booleans and text are kept"
            )
    return found


def rows_of(
    file: IO[bytes], groups: Sequence[Group], name: str, columns: Sequence[str]
) -> Iterator[list[Any]]:
    """The values of some columns of text or numbers, row by row.

    Raises:
        ValueError: a column is too long.
    """
    from pyarrow import parquet, types

    schema = parquet.ParquetFile(file).schema_arrow
    text = [
        one for one in columns if any(holds(schema.field(one).type) for holds in _of_text(types))
    ]
    # Repeated text is stored once, and stays so: all rows would be another matter.
    repeated = [
        column for column in columns if check_column(groups, name, column) and column in text
    ]
    table = parquet.ParquetFile(file, read_dictionary=repeated)
    for batch in sparing(table.iter_batches(ROWS, columns=list(columns), use_threads=False)):
        for row in zip(*(_values(batch[column]) for column in columns), strict=True):
            yield list(row)


def _check_type(kind: Any, name: str, column: str) -> None:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if not any(holds(kind) for holds in _of_text(types)):
        raise ValueError(no_paths(name, column, kind))


def _of_text(types: Any) -> tuple[Callable[[Any], bool], ...]:
    """Of Arrow's types, those that hold text, or the bytes of names that may be no UTF-8."""
    text = types.is_string, types.is_large_string, types.is_string_view
    return *text, types.is_binary, types.is_large_binary, types.is_binary_view


def _values(array: Any) -> list[Any]:
    import pyarrow

    if not isinstance(array, pyarrow.DictionaryArray):
        return array.to_pylist()
    array.validate(full=True)  # or a damaged index would name another path, or none
    codes = array.indices.to_pylist()
    words = {code: array.dictionary[code].as_py() for code in {*codes} if code is not None}
    return [words.get(code) for code in codes]
