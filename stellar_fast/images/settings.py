"""Pillow's module-wide settings, which belong to the caller: no part of `decode`'s rules.

Pillow asks them in the middle of its decoders, and other threads of the caller may be decoding by
them. So where the caller has changed one, it is replaced by a value that is the caller's everywhere
but in a thread that is within `without_settings`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile

NO_LIMIT = 1 << 62  # pixels: where the caller has none, this is the same to it


class _Here(threading.local):
    inside = False
    max_pixels = 0


_HERE = _Here()


class _Flag(int):
    """A flag of the caller's."""

    def __bool__(self) -> bool:
        return not _HERE.inside and int(self) != 0


class _Limit(int):
    """A limit of the caller's: Pillow refuses more than its double, and warns of more than it."""

    def __rmul__(self, other: int) -> int:
        return _HERE.max_pixels if _HERE.inside else int(self) * other

    def __lt__(self, other: int) -> bool:  # of `other > limit`
        return not _HERE.inside and int(self) < other


@contextmanager
def without_settings(max_pixels: int) -> Iterator[None]:
    """In here, cut off pictures are errors, and Pillow refuses what it would allocate for more than
    `max_pixels` while it opens a file, whatever the caller set."""
    flag, limit = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    if flag and not isinstance(flag, _Flag):
        ImageFile.LOAD_TRUNCATED_IMAGES = _Flag(flag)  # type: ignore[assignment]
    if not isinstance(limit, _Limit):
        Image.MAX_IMAGE_PIXELS = _Limit(NO_LIMIT if limit is None else limit)
    earlier = _HERE.inside, _HERE.max_pixels
    _HERE.inside, _HERE.max_pixels = True, max_pixels
    try:
        yield
    finally:
        _HERE.inside, _HERE.max_pixels = earlier
