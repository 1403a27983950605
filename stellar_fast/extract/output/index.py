"""The index of a partition: a line an image, written and read again.

It may come from a stranger, and is held to what its manifest says before it is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import StellarError
from ...files import reading, to_disk, writing
from ..footer import SNAPPY, UNCOMPRESSED, in_place, read_footer
from ..records import Value
from .foreign import INDEX, INDEX_COLUMNS, MOST_TEXT
from .text import plain

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

# Of an index in the file. What snappy packs grows by a factor of 22 at most.
MOST_INDEX = MOST_TEXT  # bytes


def write_index(
    folder: Path,
    ids: Sequence[str],
    reasons: Sequence[str | None],
    sizes: Sequence[tuple[int | None, int | None]],
    keep: Mapping[str, str],
    kept: Sequence[tuple[Value, ...]],
) -> Path:
    """Writes `index.parquet`, one line an image in the order of the input.

    Columns: id (string); row (int64), its row in the features, null if the image failed; status
    (string), "ok" or "failed"; reason (string), null if ok; width and height (int32) of the upright
    picture in pixels, null if it failed; then what is kept.

    Args:
        reasons: why each image failed, None where it did not.
        keep: the columns that are kept, and their types.
        kept: their values, of each image.

    Raises:
        StellarError: it cannot be written, or its text is longer than `read_index` takes.
    """
    import pyarrow
    from pyarrow import parquet

    rows: list[int | None] = []
    good = 0
    for reason in reasons:
        rows.append(good if reason is None else None)
        good += reason is None
    states = ["ok" if reason is None else "failed" for reason in reasons]
    columns: dict[str, Sequence[Any]] = {
        "id": ids,
        "row": rows,
        "status": states,
        "reason": reasons,
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        **dict(zip(keep, zip(*kept, strict=True), strict=True)),
    }
    types = {**INDEX_COLUMNS, **keep}
    table = pyarrow.table(
        columns,
        pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()]),
    )
    path = folder / INDEX
    text = sum(table[name].nbytes for name, kind in types.items() if kind == "string")
    if text > MOST_TEXT:
        raise StellarError(
            f"{path}: {text} bytes of ids, reasons and kept text, and {MOST_TEXT} are the most; "
            "give a smaller --partition-size"
        )
    with writing(path), path.open("wb") as file:
        parquet.write_table(table, file, compression="snappy")  # what `read_index` takes
        to_disk(file)
    return path


def read_index(folder: Path, manifest: Mapping[str, Any]) -> pyarrow.Table:
    """The index of a partition, one line an image.

    Raises:
        StellarError: it cannot be read, or is not what the manifest says.
    """
    with reading(folder, INDEX) as file:
        if (length := os.fstat(file.fileno()).st_size) > MOST_INDEX:
            raise ValueError(f"it has {length} bytes, and {MOST_INDEX} are the most")
        groups = read_footer(file)
        # One group, as `write_index` makes of at most `MOST_IMAGES` lines.
        if [group.rows for group in groups] != [manifest["images"]]:
            lines = sum(group.rows for group in groups)
            raise ValueError(f"it has {lines} lines, and its manifest {manifest['images']}")
        if any(codec not in (UNCOMPRESSED, SNAPPY) for codec in groups[0].codecs):
            raise ValueError("it is packed otherwise than by snappy")
        types = {**INDEX_COLUMNS, **manifest["keep"]}
        text = [name for name, kind in types.items() if kind == "string"]
        table = _unpacked(in_place(file, read_dictionary=text), types, text)
        _check_index(table, manifest)
        return table


def _unpacked(
    file: parquet.ParquetFile, types: Mapping[str, str], text: list[str]
) -> pyarrow.Table:
    """The table of an index whose text, however often it is repeated, is within `MOST_TEXT`."""
    packed = "dictionary<values=string, indices=int32, ordered=0>"
    found = {field.name: str(field.type) for field in file.schema_arrow}
    names = {"float64": "double"}  # as Arrow writes them
    expected = {name: names.get(kind, kind) for name, kind in types.items()}
    expected |= dict.fromkeys(text, packed)
    if found != expected or len(file.schema_arrow) != len(expected):
        raise ValueError("its columns are not those of an index")
    return plain(file.read(), text)


def _check_index(table: pyarrow.Table, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError where its lines are not those of the manifest's rows, in order."""
    import pyarrow
    import pyarrow.compute as compute

    good = compute.is_valid(table["row"])
    rows = table["row"].drop_null().to_numpy()
    if not np.array_equal(rows, np.arange(manifest["rows"])):
        raise ValueError(f"its rows are not 0 to {manifest['rows']} - 1 in order")
    status = compute.if_else(good, pyarrow.scalar("ok"), pyarrow.scalar("failed"))
    for what, holds in (
        ("an id", compute.is_valid(table["id"])),
        ("the status of its row", compute.fill_null(compute.equal(table["status"], status), False)),
        ("a reason where it failed, alone", compute.xor(good, compute.is_valid(table["reason"]))),
    ):
        if not compute.all(holds, min_count=0).as_py():
            raise ValueError(f"a line has not {what}")


def ok(table: pyarrow.Table) -> pyarrow.ChunkedArray:
    """Which lines of an index are images that have a row."""
    import pyarrow.compute as compute

    return compute.equal(table["status"], "ok")
