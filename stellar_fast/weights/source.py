"""From a model's name to its geometry and its weights file, on the Hub or in a local folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..config import MODELS, ModelConfig
from ..errors import DownloadError
from ..files import MAX_JSON
from . import hub
from .manifest import CONFIG_FILE, NOTHING_SAID, Trained, missing, read_model, read_models
from .names import published_shapes

PUBLISHED_REPO = "microsoft/STELLAR"
# Bytes that a weights file may have beyond every published tensor in float64: a header, and the
# tokenizer that a file saved in training holds.
BESIDE_WEIGHTS = 1_000_000_000

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Located:
    """One model's geometry, and its weights file on this machine."""

    config: ModelConfig
    weights: Path
    trained: Trained = NOTHING_SAID


def locate(
    name: str,
    *,
    repo: PathLike,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    check: Callable[[Trained], None] = lambda trained: None,
) -> Located:
    """A model's files: those of a local folder, or downloaded unless the Hub's cache has them.

    Args:
        name: a model of the repository's `config.json`.
        repo: a Hub repository, "owner/name", or a local folder in the published layout: an
            `os.PathLike`, or a string of any other form. What is on the disk never decides which.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub`; a local folder has
            no use for them.
        check: may refuse a model before its weights are looked for.

    Returns:
        The geometry and the weights file, both of the same commit.

    Raises:
        ValueError: the repository has no model of this name.
        DownloadError: a file cannot be had.
        CheckpointError: `config.json` is not in the published layout.
    """
    folder = local_folder(repo)
    if folder is not None:
        config, trained = read_model(folder / CONFIG_FILE, name)
        check(trained)
        weights = folder / config.weights
        if not os.path.isfile(weights):  # Path.is_file raises for a name that is too long
            missing(weights, f"the weights of {name!r} as {folder / CONFIG_FILE} names them")
        return Located(config, weights, trained)

    repo = os.fspath(repo)
    if repo == PUBLISHED_REPO and name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {repo} has: {', '.join(MODELS)}")
    get = partial(
        hub.fetch, repo, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    index = get(CONFIG_FILE, MAX_JSON, revision=revision)
    config, trained = read_model(index, name)
    check(trained)
    # The cache keeps files in a folder named after their commit. Asking for the weights of that
    # commit keeps both files of one version, whatever is pushed in between.
    commit = index.parent.name
    pinned = commit if hub.COMMIT.fullmatch(commit) else revision
    weights = get(config.weights, _most_bytes(config), revision=pinned)
    return Located(config, weights, trained)


def list_models(repo: PathLike, revision: str | None, local_files_only: bool) -> list[str]:
    """Names of the models of a repository or a local folder, in the order of its `config.json`.

    Raises:
        DownloadError, CheckpointError: as `locate`.
    """
    folder = local_folder(repo)
    if folder is not None:
        return list(read_models(folder / CONFIG_FILE))
    path = hub.fetch(
        os.fspath(repo),
        CONFIG_FILE,
        MAX_JSON,
        revision=revision,
        local_files_only=local_files_only,
    )
    return list(read_models(path))


def _most_bytes(config: ModelConfig) -> int:
    """More than any weights file of this geometry has."""
    shapes = published_shapes(config, teacher=True)
    return BESIDE_WEIGHTS + 8 * sum(map(math.prod, shapes.values()))


def local_folder(repo: PathLike) -> Path | None:
    """`repo` as a folder, or None if it is the name of a Hub repository.

    The form alone decides: "owner/name" is never a folder, or whoever can make one where a program
    is started would choose its weights.

    Raises:
        DownloadError: it is a path where no folder is.
    """
    text = os.fspath(repo)
    path = Path(os.path.expanduser(text))
    if isinstance(repo, str) and (not text or _is_hub_name(text)):
        return None
    if path.is_dir():
        return path
    if path.is_file():
        raise DownloadError(
            f"repo {text!r} is a file; give the folder with {CONFIG_FILE} and the weights, or a "
            "Hub repository"
        )
    raise DownloadError(
        f"repo {text!r} is a path, and there is no such folder (looked in {Path.cwd()}); give "
        "a folder in the published layout or a Hub repository such as 'microsoft/STELLAR'"
    )


def _is_hub_name(text: str) -> bool:
    """Whether it has the form owner/name, and is not marked as a path."""
    owner, _, name = text.partition("/")
    return bool(owner and name) and not owner.startswith((".", "~")) and not set(name) & set("/\\")


def geometry(name: str, repo: PathLike) -> ModelConfig:
    """A model's geometry without the network: a local folder's, if `repo` is one, or the published.

    Raises:
        ValueError: there is no such model, or `repo` is another Hub repository.
        DownloadError, CheckpointError: as `locate`.
    """
    folder = local_folder(repo)
    if folder is not None:
        return read_model(folder / CONFIG_FILE, name)[0]
    if repo != PUBLISHED_REPO:
        raise ValueError(
            f"synthetic weights are drawn without the network, so the geometry in {repo!r} cannot "
            "be looked up; give a local folder as repo, or leave it out"
        )
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]
