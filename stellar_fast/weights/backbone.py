"""A ViT in the layout of the library that trained it: the weights that an encoder starts from."""

from __future__ import annotations

import os
import warnings
from dataclasses import MISSING, fields
from pathlib import Path

from torch import Tensor

from ..config import BACKBONES, LAYER_NORM_EPS, BackboneConfig
from ..errors import CheckpointError, DownloadError
from ..files import MAX_JSON
from . import hub
from .checkpoint import check_tensors, read_state
from .manifest import CONFIG_FILE, read_json
from .names import canonical_name, vit_shapes
from .source import local_folder

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
# What the model is made of, and a ViT's config.json may say otherwise.
FIXED = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS, "qkv_bias": True}
BESIDE = 2_000_000_000  # bytes of a decoder or a head that the file may hold too

PathLike = str | os.PathLike[str]


def read_backbone(source: PathLike) -> tuple[BackboneConfig, dict[str, Tensor]]:
    """The geometry and the weights of a ViT or a ViT-MAE.

    Args:
        source: a Hub repository "owner/name", or a local folder; the form decides, as for
            `source.locate`. In it are `config.json` and `model.safetensors` or `pytorch_model.bin`.

    Returns:
        The geometry, and the tensors by their names below `encoder.`; a pooler only if there is
        one. Of a published backbone that cannot be downloaded the geometry alone, with a warning.

    Raises:
        DownloadError: a file cannot be had.
        CheckpointError: it is no such ViT, or tensors are missing or of another shape.
    """
    try:
        return _read(source)
    except DownloadError as error:
        if source not in BACKBONES:
            raise
        warnings.warn(
            f"the encoder has random weights until a checkpoint is loaded into it: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return BACKBONES[str(source)], {}


def _read(source: PathLike) -> tuple[BackboneConfig, dict[str, Tensor]]:
    config = _geometry(_file(source, CONFIG_FILE, MAX_JSON))
    most = 4 * config.parameters + BESIDE
    try:
        path = _file(source, WEIGHTS_FILES[0], most)
    except DownloadError:
        path = _file(source, WEIGHTS_FILES[1], most)
    shapes = vit_shapes(config, "encoder")
    known = {
        canonical_name(f"encoder.{name.removeprefix('vit.')}"): value
        for name, value in read_state(path).items()
    }
    state = {name: value for name, value in known.items() if name in shapes}
    needed = {name: shape for name, shape in shapes.items() if ".pooler." not in name}
    check_tensors(state, needed, where=str(path), ignored=shapes)
    return config, {name.removeprefix("encoder."): value for name, value in state.items()}


def _file(source: PathLike, name: str, most_bytes: int) -> Path:
    folder = local_folder(source)
    if folder is None:
        return hub.fetch(os.fspath(source), name, most_bytes)
    path = folder / name
    if not path.is_file():
        raise DownloadError(f"{path}: there is no such file")
    return path


def _geometry(path: Path) -> BackboneConfig:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("model_type") not in ("vit", "vit_mae"):
        raise CheckpointError(f"{path} is not the config.json of a ViT (model_type vit or vit_mae)")
    other = {name: content[name] for name in FIXED if content.get(name, FIXED[name]) != FIXED[name]}
    if other:
        raise CheckpointError(f"{path}: STELLAR's encoder has {FIXED}, this ViT has {other}")
    known = {field.name: field.default for field in fields(BackboneConfig)}
    missing = [
        name for name, default in known.items() if name not in content and default is MISSING
    ]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}")
    try:
        return BackboneConfig(**{name: content[name] for name in known if name in content})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
