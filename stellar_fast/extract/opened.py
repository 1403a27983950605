"""The files of partitions, opened when they are read and not all at once."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StellarError
from .layout import FEATURES_PARQUET, INDEX
from .writer import METADATA

if TYPE_CHECKING:
    import pyarrow

# Files of one `Opened` that are open at once: each holds a descriptor, of which a process has 1024
# by default.
OPEN = 64


class Opened:
    """The partitions that were read last, open. May be used from many threads."""

    def __init__(self, folders: list[Path], manifests: list[dict[str, Any]]) -> None:
        self._folders, self._manifests = folders, manifests
        self._kept: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        self.process = os.getpid()

    def rows(self, part: int, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a feature in a partition, a read-only view where there is one.

        Raises:
            StellarError: its file cannot be read, or is not what the manifest says.
        """
        return self._get(part, name)[start:stop]

    def take(self, part: int, name: str, rows: np.ndarray) -> np.ndarray:
        """The same of some rows, by number: a copy."""
        return self._get(part, name)[rows]

    def ids(self, part: int) -> pyarrow.ChunkedArray:
        """The ids of a partition's rows."""
        return self._get(part, "")

    def _get(self, part: int, name: str) -> Any:
        key = part, name
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._open(part, name)
                if len(self._kept) > OPEN:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _open(self, part: int, name: str) -> Any:
        folder, manifest = self._folders[part], self._manifests[part]
        if not name:
            table = read_index(folder)
            return table.filter(ok(table))["id"]
        facts = manifest["features"][name]
        path = folder / (FEATURES_PARQUET if manifest["format"] == "parquet" else f"{name}.npy")
        rows: np.ndarray | _ParquetRows
        try:
            if manifest["format"] == "parquet":
                rows = _ParquetRows(path, name)
            else:  # a plain view: memmap's own indexing is slow
                rows = np.load(path, mmap_mode="r").view(np.ndarray)
        except Exception as error:  # OSError, NumPy's ValueError, Arrow's own
            raise StellarError(f"{path}: cannot be read: {error}; remove {folder}") from error
        if (list(rows.shape), rows.dtype.name) != (facts["shape"], facts["dtype"]):
            raise StellarError(
                f"{path} holds {rows.dtype.name} {list(rows.shape)}, but its manifest says "
                f"{facts['dtype']} {facts['shape']}; remove {folder} and extract again"
            )
        return rows


class _ParquetRows:
    """One feature of a `features.parquet`, read by row group; the last group read is kept."""

    def __init__(self, path: Path, name: str) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, memory_map=True)
        self._name = name
        facts = json.loads(self._file.schema_arrow.metadata[METADATA])[name]
        groups = range(self._file.metadata.num_row_groups)
        counts = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = np.array([0, *accumulate(counts)])
        self.dtype = np.dtype(facts["dtype"])
        self.shape = (int(self._starts[-1]), *facts["shape"])
        self._lock = threading.Lock()
        self._last: tuple[int, np.ndarray] | None = None

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(rows.start, rows.stop)
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            at = np.flatnonzero(groups == group)
            result[at] = self._group(int(group))[rows[at] - self._starts[group]]
        return result

    def _group(self, group: int) -> np.ndarray:
        with self._lock:
            if self._last is None or self._last[0] != group:
                column = self._file.read_row_group(group, [self._name])[self._name]
                chunks = [
                    np.frombuffer(
                        chunk.buffers()[1].slice(
                            chunk.offset * chunk.type.byte_width, len(chunk) * chunk.type.byte_width
                        ),
                        self.dtype,
                    )
                    for chunk in column.chunks
                ]
                self._last = group, np.concatenate(chunks).reshape(-1, *self.shape[1:])
            return self._last[1]


def read_index(folder: Path) -> pyarrow.Table:
    """The index of a partition, one line an image.

    Raises:
        StellarError: it cannot be read.
    """
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(folder / INDEX, partitioning=None)
    except (OSError, ArrowException) as error:
        raise StellarError(f"{folder / INDEX}: cannot be read: {error}") from error


def ok(table: pyarrow.Table) -> pyarrow.ChunkedArray:
    """Which lines of an index are images that have a row."""
    import pyarrow.compute as compute

    return compute.equal(table["status"], "ok")
