"""The errors that this package raises, beside `ValueError` and `TypeError` for arguments."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

NAMES_SHOWN = 5
NAME_SHOWN = 160  # characters


def listing(names: Collection[str]) -> str:
    """Names that a file holds, for a message: printable, and not more than a few lines of them."""
    shown = ", ".join(map(_printable, islice(names, NAMES_SHOWN)))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _printable(name: str) -> str:
    text = name[:NAME_SHOWN] + ("..." if len(name) > NAME_SHOWN else "")
    return text if text.isprintable() else ascii(text)


class StellarError(Exception):
    """Base of the errors below."""


class CheckpointError(StellarError, ValueError):
    """A weights file or its tensors are not what the model needs."""


class DownloadError(StellarError, OSError):
    """A file could not be had from the Hub, the cache or a local folder."""


class ImageError(StellarError, ValueError):
    """One image could not become model input.

    Attributes:
        path: where the image came from (a path, or a description such as "<PIL image>").
        reason: one line that says what is wrong with it.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):
        # Worker processes send these back, and Exception pickles its message alone.
        return type(self), (self.path, self.reason)


class ForkError(StellarError, RuntimeError):
    """An engine was used in a process forked after the engine was made."""


class MissingExtraError(StellarError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional dependency: pip install 'stellar-fast[{extra}]'"
        )
        self.feature = feature
        self.extra = extra

    def __reduce__(self):
        return type(self), (self.feature, self.extra)
