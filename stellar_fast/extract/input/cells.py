"""Images in the cells of Parquet files, read one after another in the process that decodes them.

A row group is never in memory as a whole, since it may have gigabytes: its pages are read forward,
one row at a time, and the place where a process is stays open. So a process that reads a group's
rows in order reads each page once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from ...errors import ImageError
from ...images.reader import describe_error
from ..footer import read_footer
from ..records import Item
from . import door
from .addresses import Allowed, address_of, locate, scrubbed
from .door import MAX_BYTES, NOTHING_MORE, open_file

BUFFER = 1 << 20  # bytes of a column that are read at once


def read_item(item: Item, allowed: Allowed = NOTHING_MORE) -> bytes:
    """The bytes of one image: of its file, its member of a tar, or its cell of a Parquet file.

    A cell of null bytes with a path is the file of that path, as the `datasets` library has it; a
    relative path counts from the Parquet file's folder, and what it may name is what a list there
    may name.

    Raises:
        ImageError: they cannot be had; the reason has no credentials.
    """
    if item.column is None:
        return door.read_item(item, allowed)
    try:
        content, path = _opened(item, allowed).read(item)
        if content is None and path:
            where, _ = locate(path, address_of(item.file), allowed)
            return door.read_item(Item(item.id, where), allowed)
    except ImageError:
        raise
    except Exception as error:  # stores raise anything
        reason = scrubbed(describe_error(error, "read"), item.file)
        raise ImageError(item.id, reason) from error
    if not content:
        raise ImageError(item.id, "empty cell" if content is not None else "no image, a null cell")
    if len(content) > MAX_BYTES:
        raise ImageError(item.id, f"{len(content)} bytes are more than the limit of {MAX_BYTES}")
    return content


class _Kept(threading.local):
    def __init__(self) -> None:
        self.cells: tuple[object, _Cells] | None = None


_KEPT = _Kept()


def _opened(item: Item, allowed: Allowed) -> _Cells:
    """The file of a cell: the last one that a thread read is kept open."""
    key = item.file, item.column, allowed
    if _KEPT.cells is None or _KEPT.cells[0] != key:
        if _KEPT.cells is not None:
            _KEPT.cells[1].close()
        _KEPT.cells = None
        _KEPT.cells = key, _Cells(item, allowed)
    return _KEPT.cells[1]


class _Cells:
    """One column of an open file, with a place in it."""

    def __init__(self, item: Item, allowed: Allowed) -> None:
        import pyarrow
        from pyarrow import parquet

        # The system's gives back what is freed, and takes no more than is asked for: the memory of
        # a process that decodes is limited.
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        assert item.column is not None
        self._open = open_file(item.file, allowed)
        self._groups = read_footer(self._open)  # before Arrow, as where the input is listed
        self._file = parquet.ParquetFile(self._open, buffer_size=BUFFER, pre_buffer=False)
        kind = self._file.schema_arrow.field(item.column).type
        self._name, self._columns = item.column, [item.column]
        if pyarrow.types.is_struct(kind):
            inner = {kind.field(at).name for at in range(kind.num_fields)}
            self._columns = [f"{item.column}.{name}" for name in ("bytes", "path") if name in inner]
        self._batches: Iterator[Any] = iter(())
        self._group, self._next = -1, 0
        self._problem: Exception | None = None

    def close(self) -> None:
        self._open.close()

    def read(self, item: Item) -> tuple[bytes | None, str | None]:
        """The bytes and the path in a cell, either of which may be none."""
        group, row = item.group, item.row
        assert group is not None and row is not None
        if not 0 <= group < len(self._groups) or row >= self._groups[group].rows:
            raise OSError("the file has changed since it was listed: it has no such row")
        if group != self._group or row < self._next - 1:
            self._begin(group)
        while self._next <= row:
            self._step()
        (value,) = self._last.to_pylist()
        if not isinstance(value, dict):
            return value, None
        return value.get("bytes"), value.get("path")

    def _begin(self, group: int) -> None:
        self._group, self._next, self._problem = group, 0, None
        self._batches = self._file.iter_batches(
            1, row_groups=[group], columns=self._columns, use_threads=False
        )

    def _step(self) -> None:
        # What is behind a page that cannot be read cannot be read either, and is not tried again
        # for each row.
        if self._problem is not None:
            raise self._problem
        try:
            batch = next(self._batches, None)
        except Exception as error:
            self._problem = error
            raise
        if batch is None:
            self._problem = OSError(f"row group {self._group} ends before its row {self._next}")
            raise self._problem
        self._last = batch[self._name]
        self._next += 1
