"""What is an image by its name, for folders, tars and stores alike; all else is counted."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping

from ...printable import printable

# Of the formats that images.decode reads. A list may name files with any suffix.
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
OTHER = (".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".j2k", ".avif")
PNM = (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset((*JPEG, *OTHER, *PNM))

# A stranger's tar may have millions of suffixes, of any length.
MOST_REASONS, LONGEST_SUFFIX = 100, 12
NAMED = 5  # reasons that a line tells


def suffix_of(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


class Sieve:
    """Tells images from what else there is, and counts that.

    Attributes:
        skipped: what was left out, by the reason.
    """

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    def keeps(self, path: str) -> bool:
        """Whether the file at `path`, of a folder or an archive, is an image by its name: with a
        suffix of `SUFFIXES` in any case, and neither hidden nor in a hidden folder."""
        suffix = suffix_of(path)
        if suffix not in SUFFIXES:
            self.skip(f"{printable(suffix)} files" if suffix else "files without a suffix")
            return False
        if any(part.startswith(".") and part not in (".", "..") for part in path.split("/")):
            self.skip("hidden images")
            return False
        return True

    def skip(self, reason: str, count: int = 1) -> None:
        """Counts what is left out."""
        if not count:
            return
        known = reason in self.skipped or len(self.skipped) < MOST_REASONS
        short = not reason.startswith(".") or len(reason) <= LONGEST_SUFFIX + len(" files")
        self.skipped[reason if known and short else "other files"] += count

    def nothing(self) -> str:
        """What was found where there are no images."""
        left = told(self.skipped)
        return f"looked for {' '.join(sorted(SUFFIXES))}" + (f", found {left}" if left else "")


def told(skipped: Mapping[str, int]) -> str:
    """What was left out, in words, the most frequent first."""
    first = sorted(skipped.items(), key=lambda one: (-one[1], one[0]))
    rest = sum(count for _, count in first[NAMED:])
    parts = [f"{count} {reason}" for reason, count in first[:NAMED]]
    return ", ".join([*parts, f"{rest} others"] if rest else parts)
