"""Values kept for the next call, within a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """The values used last, as many as fit into `most_bytes` together; for many threads.

    A value that alone is larger is handed out and not kept.

    Args:
        most_bytes: of all that is kept.
        size: bytes of a value.
    """

    def __init__(self, most_bytes: int, size: Callable[[V], int]) -> None:
        self._most_bytes = most_bytes
        self._size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[K, V] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        with self._lock:
            return sum(map(self._size, self._kept.values()))

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value kept under `key`, else a new one of `make`."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = make()  # outside the lock: at worst two threads make the same value
        with self._lock:
            self._kept[key] = value
            self._kept.move_to_end(key)
            kept = sum(map(self._size, self._kept.values()))
            while kept > self._most_bytes:
                # The oldest first; the new one itself where it is too large even alone.
                _, gone = self._kept.popitem(last=self._size(value) > self._most_bytes)
                kept -= self._size(gone)
        return value

    def evict(self) -> bool:
        """Gives up every value; whether there was one to give up."""
        with self._lock:
            gone = bool(self._kept)
            self._kept.clear()
        return gone
