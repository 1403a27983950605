"""What the parts of an extraction hand each other."""

from __future__ import annotations

import os
from dataclasses import dataclass

PathLike = str | os.PathLike[str]
Value = int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class Item:
    """One image to read.

    Attributes:
        id: what the index calls it: its path, its tar and member as `TAR::MEMBER`, or its Parquet
            file and row as `FILE::ROW`; printable.
        file: where it is, a local path or an address; for a member, its tar.
        offset, size: for a member of a tar, its bytes there.
        kept: what is carried along of it, in the order of the plan's `keep`.
        column, group, row: for a cell of a Parquet file, its column, row group, and row in that.
    """

    id: str
    file: str
    offset: int | None = None
    size: int | None = None
    column: str | None = None
    group: int | None = None
    row: int | None = None
    kept: tuple[Value, ...] = ()
