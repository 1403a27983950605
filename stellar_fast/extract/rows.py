"""The rows of all partitions, one after another, and one feature of them as an array."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StellarError
from .output.opened import Opened


class Rows:
    """Where the rows of an output are. May be pickled: files are opened where they are read.

    Attributes:
        folder: the output folder.
        folders: of the partitions that are there, in order.
        manifests: theirs.
        starts: the first row of each, and at the end the number of all: row r is in the last
            partition that starts at or before it.
    """

    def __init__(self, folder: Path, folders: list[Path], manifests: list[dict[str, Any]]) -> None:
        self.folder, self.folders, self.manifests = folder, folders, manifests
        self.starts = list(accumulate((manifest["rows"] for manifest in manifests), initial=0))
        self._files: Opened | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": None}

    @property
    def opened(self) -> Opened:
        if self._files is None or self._files.process != os.getpid():  # forked: locks and threads
            self._files = Opened(self.folders, self.manifests)
        return self._files

    def split(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Rows by partition: its number, their places in `rows`, and their rows there."""
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(parts, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
            if len(at):
                part = int(parts[at[0]])
                yield part, at, rows[at] - self.starts[part]


class Feature:
    """One feature of all images, as a read-only array (rows, ...) of which nothing is loaded.

    Indexed like a NumPy array along its rows: by an integer, a slice, a sequence of integers, or a
    sequence of as many booleans as there are rows. What comes back is a NumPy array; within one
    partition of `.npy` files, integers and slices give read-only views of the file.
    """

    def __init__(self, rows: Rows, name: str, dtype: str) -> None:
        self._rows, self.name, self.dtype = rows, name, np.dtype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...).

        Raises:
            StellarError: no partition is complete, so that the shape of a row is not known.
        """
        if not self._rows.manifests:
            raise StellarError(f"{self._rows.folder}: no partition is complete yet")
        return (len(self), *self._rows.manifests[0]["features"][self.name]["shape"][1:])

    @property
    def nbytes(self) -> int:
        """Bytes that `to_numpy` takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<Feature {self.name}: {self.dtype} {self.shape}>"

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, tuple):
            raise IndexError(
                "one index chooses rows, and a second one what they give: "
                f"{self.name}[row][...], {self.name}[rows][:, ...]"
            )
        if isinstance(rows, slice):
            return self._slice(*rows.indices(len(self)))
        chosen = checked(np.asarray(rows), len(self))
        if chosen.ndim == 0:
            return self._slice(int(chosen), int(chosen) + 1, 1)[0]
        return self._take(chosen)

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.blocks():
            yield from block

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.name} is in files: an array of all of it is always a copy")
        return np.asarray(self.to_numpy(), dtype=dtype)

    def blocks(self, rows: int = 4096) -> Iterator[np.ndarray]:
        """All rows in order, at most `rows` at a time, for what does not fit into memory."""
        if rows < 1:
            raise ValueError(f"a block has at least 1 row, got {rows}")
        for start, stop in pairwise(self._rows.starts):
            for first in range(start, stop, rows):
                yield self._slice(first, min(first + rows, stop), 1)

    def to_numpy(self) -> np.ndarray:
        """All of it in memory: (rows, ...), yours to write to."""
        result = np.empty(self.shape, self.dtype)
        at = 0
        for block in self.blocks():
            result[at : at + len(block)] = block
            at += len(block)
        return result

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1 or stop <= start:
            return self._take(np.arange(start, stop, step))
        starts, opened = self._rows.starts, self._rows.opened
        pieces = []
        part = bisect.bisect_right(starts, start) - 1
        while start < stop:
            end = min(stop, starts[part + 1])
            if end > start:
                pieces.append(
                    opened.rows(part, self.name, start - starts[part], end - starts[part])
                )
            start = end
            part += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part, at, inside in self._rows.split(rows):
            result[at] = self._rows.opened.take(part, self.name, inside)
        return result


def checked(rows: np.ndarray, length: int) -> np.ndarray:
    """Row numbers from 0 up, of row numbers that may count from the end, or of a mask."""
    if rows.dtype == bool:
        if rows.shape != (length,):
            raise IndexError(f"a mask has {length} booleans, one a row; got shape {rows.shape}")
        return np.flatnonzero(rows)
    if rows.size == 0 and rows.ndim == 1:
        return rows.astype(np.int64)
    if rows.dtype.kind not in "iu" or rows.ndim > 1:
        raise IndexError(
            "rows are chosen by an integer, a slice, or a one-dimensional sequence of integers or "
            f"booleans; got {rows.dtype} of shape {rows.shape}"
        )
    wrong = rows[(rows < -length) | (rows >= length)]  # before large ones are cast
    if wrong.size:
        raise IndexError(f"row {wrong.flat[0]} is out of range: there are {length} rows")
    rows = rows.astype(np.int64)
    return np.where(rows < 0, rows + length, rows)
