"""Where a model's files come from: a Hub repository, its cache, or a local folder."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..config import DEPTHS, MODELS, BackboneConfig, ModelConfig
from ..errors import CheckpointError, DownloadError, listing
from ..files import MAX_JSON, parse_json
from .names import CLUSTERS, published_shapes

CONFIG_FILE = "config.json"
PUBLISHED_REPO = "microsoft/STELLAR"
# Tries to reach the server, and the seconds after which no further try begins: huggingface_hub's
# own retries add up to half a minute where nothing listens, and to minutes where nothing answers.
TRIES = 3
PATIENCE = 5.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
MOST_CLUSTERS = 10 * CLUSTERS
COMMIT = re.compile("[0-9a-f]{40}")
# Bytes that a weights file may have beyond every published tensor in float64: a header, and the
# tokenizer that a file saved in training holds.
BESIDE_WEIGHTS = 1_000_000_000
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# huggingface_hub's HTTP client: requests before 1.0, then httpx, then httpx2.
HTTP_CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Trained:
    """What a `config.json` says of the parts that training alone has.

    Attributes:
        do_cls: there is a clustering head for the CLS token.
        num_clusters: prototypes of each clustering head.
        pixel_head: the decoder draws pixels instead of predicting codes; None: it does not say.
    """

    do_cls: bool = True
    num_clusters: int = CLUSTERS
    pixel_head: bool | None = None


@dataclass(frozen=True)
class Located:
    """One model's geometry, and its weights file on this machine."""

    config: ModelConfig
    weights: Path
    trained: Trained = Trained()


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
            _missing(weights, f"the weights of {name!r} as {folder / CONFIG_FILE} names them")
        return Located(config, weights, trained)

    repo = os.fspath(repo)
    if repo == PUBLISHED_REPO and name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {repo} has: {', '.join(MODELS)}")
    get = partial(_fetch, repo, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    index = get(CONFIG_FILE, revision, MAX_JSON)
    config, trained = read_model(index, name)
    check(trained)
    # The cache keeps files in a folder named after their commit. Asking for the weights of that
    # commit keeps both files of one version, whatever is pushed in between.
    commit = index.parent.name
    pinned = commit if COMMIT.fullmatch(commit) else revision
    return Located(config, get(config.weights, pinned, _most_bytes(config)), trained)


def list_models(repo: PathLike, revision: str | None, local_files_only: bool) -> list[str]:
    """Names of the models of a repository or a local folder, in the order of its `config.json`.

    Raises:
        DownloadError, CheckpointError: as `locate`.
    """
    folder = local_folder(repo)
    if folder is not None:
        return list(_models(folder / CONFIG_FILE))
    path = _fetch(
        os.fspath(repo),
        CONFIG_FILE,
        revision,
        MAX_JSON,
        cache_dir=None,
        token=None,
        local_files_only=local_files_only,
    )
    return list(_models(path))


def fetch(repo: str, file: str, most_bytes: int) -> Path:
    """One file of a Hub repository, as `locate` gets it.

    Raises:
        DownloadError: it cannot be had, or has more than `most_bytes`.
    """
    return _fetch(repo, file, None, most_bytes, cache_dir=None, token=None, local_files_only=False)


def _most_bytes(config: ModelConfig) -> int:
    """More than any weights file of this geometry has."""
    shapes = published_shapes(config, teacher=True)
    return BESIDE_WEIGHTS + 8 * sum(map(math.prod, shapes.values()))


def read_config(path: Path, name: str) -> ModelConfig:
    """The geometry alone of `read_model`."""
    return read_model(path, name)[0]


def read_model(path: Path, name: str) -> tuple[ModelConfig, Trained]:
    """The entry of one model in a `config.json` of the published layout.

    Raises:
        ValueError: no such model; the message lists those there are.
        DownloadError: there is no such file, or it cannot be read.
        CheckpointError: the file is not in the published layout; names the field.
    """
    models = _models(path)
    if name not in models:
        raise ValueError(f"unknown model {name!r}; {path} has: {listing(models) or 'none'}")
    where = f"{path}: models.{name}"
    return _model(name, models[name], where), _trained(models[name], where)


def _models(path: Path) -> dict[str, Any]:
    if not path.is_file():
        _missing(path, "a file of the published layout")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path} has more than {MAX_JSON} bytes, which no config.json needs")
    try:
        content = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); it starts with {raw[:40]!r}. If it was downloaded, "
            f"delete {path.resolve()} and load again"
        ) from error
    models = _member(content, "models", str(path))
    if not isinstance(models, dict):
        raise CheckpointError(f"{path}: 'models' must be an object of models, got {_show(models)}")
    return models


def _show(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _member(entry: object, field: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {_show(entry)}")
    if field not in entry:
        fields = listing([repr(key) for key in entry]) or "none"
        raise CheckpointError(f"{where} has no field {field!r}; it has: {fields}")
    return entry[field]


def _model(name: str, entry: object, where: str) -> ModelConfig:
    """`entry` checked field by field. All of them are needed, as every published entry has them: a
    temperature taken for granted would give wrong features without a word. The backbone is named
    or described, or follows from its width, as in newer files."""
    weights = _member(entry, "weights", where)
    tokens = _member(entry, "num_sparse_tokens", where)
    layers = _member(entry, "num_decoder_layers", where)
    temperature = _member(entry, "spatial_temp", where)
    backbone = _backbone(entry, where)
    if not isinstance(weights, str) or not _stays_inside(weights):
        raise CheckpointError(
            f"{where}.weights must be the path of a file inside the repository, got "
            f"{_show(weights)}"
        )
    if temperature is not None and (
        isinstance(temperature, bool) or not isinstance(temperature, int | float)
    ):
        raise CheckpointError(
            f"{where}.spatial_temp must be a positive number or null, got {_show(temperature)}"
        )
    try:
        return ModelConfig(
            name, BackboneConfig.resolve(backbone), tokens, layers, temperature, weights
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _backbone(entry: object, where: str) -> Any:
    if not isinstance(entry, dict) or "embed_dim" not in entry or "backbone" in entry:
        return _member(entry, "backbone", where)
    width = entry["embed_dim"]
    if isinstance(width, bool) or not isinstance(width, int) or width not in DEPTHS:
        raise CheckpointError(
            f"{where}.embed_dim must be one of {', '.join(map(str, DEPTHS))}, got {_show(width)}"
        )
    layers, heads = DEPTHS[width]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": _member(entry, "patch_size", where),
        "image_size": _member(entry, "image_size", where),
    }


def _trained(entry: dict[str, Any], where: str) -> Trained:
    do_cls = entry.get("do_cls", True)
    clusters, kind = entry.get("num_clusters", CLUSTERS), entry.get("recon_type")
    if not isinstance(do_cls, bool):
        raise CheckpointError(f"{where}.do_cls must be true or false, got {_show(do_cls)}")
    if (
        isinstance(clusters, bool)
        or not isinstance(clusters, int)
        or not 0 < clusters <= MOST_CLUSTERS
    ):
        raise CheckpointError(
            f"{where}.num_clusters must be from 1 to {MOST_CLUSTERS}, got {_show(clusters)}"
        )
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{where}.recon_type must be a string, got {_show(kind)}")
    return Trained(do_cls, clusters, None if kind is None else kind != "vq")


def _stays_inside(path: str) -> bool:
    """Whether a relative path names something below the folder it starts from, on every system."""
    windows = PureWindowsPath(path)
    parts = PurePosixPath(path).parts
    return bool(parts) and not windows.anchor and ".." not in windows.parts and "\0" not in path


def _missing(path: Path, what: str) -> NoReturn:
    folder = path.parent
    if not folder.is_dir():
        raise DownloadError(f"{path} is missing ({what}): there is no folder {folder}")
    found = listing(sorted(entry.name for entry in folder.iterdir()))
    raise DownloadError(f"{path} is missing ({what}); the folder has: {found or 'nothing'}")


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


def _folder_here(repo: str) -> str:
    """What to say of a folder that has the name of a repository."""
    return f"; for the folder here, write './{repo}'" if os.path.isdir(repo) else ""


def _fetch(
    repo: str,
    file: str,
    revision: str | None,
    most_bytes: int,
    *,
    cache_dir: PathLike | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """One file of a Hub repository: from the cache where it is up to date or the server is out of
    reach, else downloaded, if it has no more than `most_bytes`."""
    folder = None if cache_dir is None else Path(cache_dir).expanduser().resolve()
    cached = partial(_cached, repo, file, revision, folder)
    try:
        # A commit does not change: what the cache has of it needs no question.
        if local_files_only or (revision is not None and COMMIT.fullmatch(revision)):
            path = cached()
            if path is not None:
                return path
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
        try:
            size = _reach(
                hf_hub_url(repo, file, revision=revision),
                token,
                stop=lambda: cached() is not None,
            )
        except (HFValidationError, RevisionNotFoundError, EntryNotFoundError):
            raise
        except Exception:
            path = cached()
            if path is None:
                raise
            return path
        if size is not None and size > most_bytes:
            raise _TooLarge(f"it has {size} bytes, and no such file needs more than {most_bytes}")
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=folder, token=token))
    # Whatever the library and the three HTTP clients of its supported versions raise is the same
    # to the caller: the file could not be had.
    except Exception as error:
        reason, remedy = _explain(error, repo, file, local_files_only)
        shown = revision or constants.DEFAULT_REVISION
        raise DownloadError(
            f"cannot get {file!r} of Hub repository {repo!r} at revision {shown!r}: {reason}; "
            f"{remedy}{_folder_here(repo)}"
        ) from error


def _cached(repo: str, file: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    # Not `hf_hub_download(local_files_only=True)`, which may still ask the server for its list of
    # coding agents to describe itself to it.
    path = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _reach(url: str, token: str | bool | None, stop: Callable[[], bool]) -> int | None:
    """A file's size, asked of the server, again for failures that pass, unless `stop()`.

    `hf_hub_download` asks again by itself, but with no option for how long.
    """
    start = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            return get_hf_file_metadata(url, token=token, timeout=timeout).size
        except Exception as error:
            waited = time.monotonic() - start
            if attempt == TRIES or waited > PATIENCE or not _passes(error) or stop():
                raise
            time.sleep(attempt)


class _TooLarge(Exception):
    pass


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport(error: BaseException) -> bool:
    """Whether the connection failed, as opposed to the server answering with an error."""
    client = type(error).__module__.split(".")[0] in HTTP_CLIENTS and _status(error) is None
    return client or isinstance(error, ConnectionError | TimeoutError)


def _passes(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return _is_transport(error) or _status(error) in TRANSIENT


def _explain(  # noqa: C901, one case after another
    error: BaseException, repo: str, file: str, local_files_only: bool
) -> tuple[str, str]:
    """One line each: why the file could not be had, and what to do."""
    # The library hides the server's answer behind its own "not in the cache" error.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    log_in = "pass token= or run `hf auth login`"
    page = f"{constants.ENDPOINT}/{repo}"
    status = _status(error)
    answer = f"{constants.ENDPOINT} answered {status}"
    if local_files_only and isinstance(error, LocalEntryNotFoundError):
        return (
            "it is not in the cache, and local_files_only=True forbids to download it",
            "load once without it, or pass the cache_dir that has it",
        )
    if isinstance(error, _TooLarge):
        return str(error), f"see {page}/tree/main"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "it is not in the cache, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, or pass the cache_dir or a folder that has it",
        )
    if isinstance(error, HFValidationError):
        return (
            f"{repo!r} is no repository name ({_line(error)})",
            "give 'owner/name' or an existing folder",
        )
    if isinstance(error, LocalTokenNotFoundError):
        return "token=True, but no token is stored on this machine", log_in
    if isinstance(error, GatedRepoError):
        return f"{answer}: access to it is restricted", f"ask for access at {page}, then {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{answer}: there is no such revision", f"see {page}/tree/main for those there are"
    if isinstance(error, EntryNotFoundError) and status is not None:
        return f"{answer}: there is no such file", f"see {page}/tree/main for those there are"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{answer}: there is no such repository, or it is private",
            f"check the name, or {log_in}",
        )
    if status in (401, 403):
        return f"{answer}: no permission to read it", log_in
    if status is not None:
        return answer, "try again later, or use a folder that has the files"
    if isinstance(error, FileMetadataError):
        return (
            f"{constants.ENDPOINT} does not answer as a Hub does ({_line(error)})",
            "check HF_ENDPOINT, the proxy, and whether the network wants a login",
        )
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"no space left on the disk ({_line(error)})", "free some, or pass another cache_dir"
    if isinstance(error, OSError) and "onsistency check failed" in str(error):
        return f"the file arrived incomplete ({_line(error)})", "load again to download it anew"
    if _is_transport(error):
        return (
            f"the connection to {constants.ENDPOINT} failed ({_line(error)}), and it is not in the "
            "cache",
            "check the network and proxy and load again, or pass a folder that has the files",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"the cache cannot be used ({_line(error)})", "pass another cache_dir"
    return f"{type(error).__name__}: {_line(error)}", "load again, or pass a folder as repo"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
