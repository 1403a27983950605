"""`config.json` of a repository: which models it has, their geometry, and their weights files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from ..config import DEPTHS, BackboneConfig, ModelConfig
from ..errors import CheckpointError, DownloadError, listing
from ..files import MAX_JSON, parse_json, replacing
from .names import CLUSTERS

CONFIG_FILE = "config.json"
MOST_CLUSTERS = 10 * CLUSTERS


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


NOTHING_SAID = Trained()


def write_config(folder: Path, config: ModelConfig, weights: str, **more: Any) -> None:
    """Writes the `config.json` of one model, whose weights are in the file `weights` beside it.

    Args:
        more: further members of its entry.

    Raises:
        StellarError: it cannot be written.
    """
    entry = {
        "weights": weights,
        "num_sparse_tokens": config.num_sparse_tokens,
        "num_decoder_layers": config.num_decoder_layers,
        "spatial_temp": config.spatial_temp,
        "backbone": asdict(config.backbone),
        **more,
    }
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps({"models": {config.name: entry}}, indent=1))


def read_model(path: Path, name: str) -> tuple[ModelConfig, Trained]:
    """The entry of one model in a `config.json` of the published layout.

    Raises:
        ValueError: no such model; the message lists those there are.
        DownloadError: there is no such file, or it cannot be read.
        CheckpointError: the file is not in the published layout; names the field.
    """
    models = read_models(path)
    if name not in models:
        raise ValueError(f"unknown model {name!r}; {path} has: {listing(models) or 'none'}")
    where = f"{path}: models.{name}"
    return _model(name, models[name], where), _trained(models[name], where)


def read_models(path: Path) -> dict[str, Any]:
    """The entries of a `config.json`, not looked into: {name: entry}.

    Raises:
        DownloadError, CheckpointError: as `read_model`.
    """
    if not path.is_file():
        missing(path, "a file of the published layout")
    models = _member(read_json(path), "models", str(path))
    if not isinstance(models, dict):
        raise CheckpointError(f"{path}: 'models' must be an object of models, got {_show(models)}")
    return models


def read_json(path: Path) -> Any:
    """What a `config.json` holds, of any kind.

    Raises:
        DownloadError: it cannot be read.
        CheckpointError: it is too large, or not JSON.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path} has more than {MAX_JSON} bytes, which no config.json needs")
    try:
        return parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); it starts with {raw[:40]!r}. If it was downloaded, "
            f"delete {path.resolve()} and load again"
        ) from error


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


def missing(path: Path, what: str) -> NoReturn:
    """Says that a file of a local folder is not there, and what is.

    Raises:
        DownloadError: always.
    """
    folder = path.parent
    if not folder.is_dir():
        raise DownloadError(f"{path} is missing ({what}): there is no folder {folder}")
    found = listing(sorted(entry.name for entry in folder.iterdir()))
    raise DownloadError(f"{path} is missing ({what}); the folder has: {found or 'nothing'}")
