"""The files of partitions, opened when they are read and not all at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import FORMATS
from .index import ok, read_index

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
        if name:
            return FORMATS[manifest["format"]].open(folder, manifest, name)
        table = read_index(folder, manifest)
        return table.filter(ok(table))["id"]
