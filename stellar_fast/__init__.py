"""stellar-fast: an inference engine for the STELLAR vision transformer.

`load(name).encode(batch)` gives sparse tokens and spatial maps; `load_stellar` stands in for the
published loader. Importing this package does not import torch: the first `load` does.
"""

from typing import TYPE_CHECKING, Any

from .config import list_models
from .errors import (
    CheckpointError,
    DownloadError,
    ForkError,
    ImageError,
    MissingExtraError,
    StellarError,
)

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .extract.features import open_features
    from .loading import load, load_stellar

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DownloadError",
    "Engine",
    "ForkError",
    "ImageError",
    "MissingExtraError",
    "StellarError",
    "list_models",
    "load",
    "load_stellar",
    "open_features",
]

_LAZY = {
    "Engine": "engine.engine",
    "load": "loading",
    "load_stellar": "loading",
    "open_features": "extract.features",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
