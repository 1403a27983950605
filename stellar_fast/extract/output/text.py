"""Text in the tables of an output folder, which may be stored once and stand in every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .foreign import MOST_TEXT

if TYPE_CHECKING:
    import pyarrow


def plain(table: pyarrow.Table, names: Sequence[str]) -> pyarrow.Table:
    """A table without the dictionaries of its columns `names`, which are of text or bytes.

    Raises:
        ValueError: they unpack to more than `MOST_TEXT`, or are damaged.
    """
    import pyarrow
    import pyarrow.compute as compute

    table.validate(full=True)  # UTF-8, and places in the dictionary
    size = 0
    for name in names:
        for chunk in table[name].chunks:
            sizes = compute.binary_length(chunk.dictionary).cast(pyarrow.int64())
            size += compute.sum(sizes.take(chunk.indices)).as_py() or 0
    if size > MOST_TEXT:
        raise ValueError(f"its text unpacks to {size} bytes, and {MOST_TEXT} are the most")
    return pyarrow.table(
        {
            name: table[name].cast(table[name].type.value_type) if name in names else table[name]
            for name in table.column_names
        }
    )
