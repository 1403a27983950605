"""stellar-fast: an inference engine for the STELLAR vision transformer.

`load(name).encode(batch)` gives sparse tokens and spatial maps; `load_stellar` stands in for the
published loader. Importing this package does not import torch: the first `load` does.
"""

from typing import TYPE_CHECKING, Any

from .config import MODELS
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
    from .extracting import extract_features
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
    "extract_features",
    "list_models",
    "load",
    "load_stellar",
    "open_features",
]

_LAZY = {
    "Engine": "engine.engine",
    "extract_features": "extracting",
    "load": "loading",
    "load_stellar": "loading",
    "open_features": "extract.features",
}


def list_models(
    *, repo_id: Any = None, revision: str | None = None, local_files_only: bool = False
) -> list[str]:
    """Names of models: the five published ones, or with any argument those of a `config.json`.

    Args:
        repo_id: a Hub repository, by default the published one, or a local folder.
        revision, local_files_only: as in `huggingface_hub`.

    Raises:
        DownloadError, CheckpointError: the file cannot be had, or is in another layout.
    """
    if repo_id is None and revision is None and not local_files_only:
        return list(MODELS)
    from .weights import source

    return source.list_models(repo_id or source.PUBLISHED_REPO, revision, local_files_only)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
