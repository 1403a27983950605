"""Parquet files with images in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pictures import photograph, saved
from pyarrow import parquet

from stellar_fast.extract.input import cells as reading
from stellar_fast.extract.work import decoding

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def jpeg(seed: int) -> bytes:
    return saved(photograph(48, 40, seed), "JPEG", quality=90)


def cells(contents: Sequence[bytes | None], paths: Sequence[str | None] | None = None):
    """A column as the `datasets` library writes it."""
    paths = paths or [None] * len(contents)
    pairs = zip(contents, paths, strict=True)
    return pyarrow.array([{"bytes": content, "path": path} for content, path in pairs], IMAGE)


def write(path: Path, group: int = 5, /, **columns) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def counting_work(*arguments) -> None:
    """A decoding process that notes each row group that it begins to read, beside its file."""
    opened, begin = reading._opened, reading._Cells._begin
    place: list[str] = []

    def noting_place(item, allowed):
        place[:] = [item.file]
        return opened(item, allowed)

    def noting_group(self, group: int) -> None:
        with open(f"{place[0]}.begun", "a") as file:
            file.write(f"{group}\n")
        begin(self, group)

    patched: Any = reading
    patched._opened, patched._Cells._begin = noting_place, noting_group
    decoding.work(*arguments)
