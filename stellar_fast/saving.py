"""Packed weights in a file: what `Engine.save` writes and `load` reads back.

A folder in the published layout, `config.json` and one safetensors file, whose metadata says how
its tensors make up the dataclasses of `weights.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import weights as kinds
from .config import ModelConfig
from .errors import CheckpointError, StellarError
from .files import replacing, writing
from .weights import DecoderWeights, EncoderWeights

FORMAT = 1
METADATA = "stellar_fast"
CONFIG_FILE = "config.json"


def _flatten(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The structure of `node` as JSON, its tensors put into `tensors` by name."""
    if isinstance(node, Tensor):
        # A view, such as the query's rows of qkv, would drag all of its base along.
        tensors[name] = node.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(node, tuple):
        return [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(node)]
    if is_dataclass(node) and not isinstance(node, type):
        return {
            "kind": type(node).__name__,
            "fields": {
                field.name: _flatten(getattr(node, field.name), f"{name}.{field.name}", tensors)
                for field in fields(node)
            },
        }
    return node


def _build(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(structure, list):
        return tuple(_build(item, tensors) for item in structure)
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return tensors[structure["tensor"]]
    kind = getattr(kinds, structure["kind"])
    return kind(**{key: _build(item, tensors) for key, item in structure["fields"].items()})


def save(
    folder: Path,
    config: ModelConfig,
    precision: str,
    encoder: EncoderWeights,
    decoder: DecoderWeights | None,
) -> None:
    """Writes `folder`, made if it is not there: the weights whole, then the config.

    Raises:
        StellarError: it cannot be written, or holds models already.
    """
    if (folder / CONFIG_FILE).exists():
        raise StellarError(f"{folder} holds models already; save into a folder without them")
    tensors: dict[str, Tensor] = {}
    structure = {
        "encoder": _flatten(encoder, "encoder", tensors),
        "decoder": _flatten(decoder, "decoder", tensors),
    }
    header = {"format": FORMAT, "precision": precision, "structure": structure}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = f"{config.name}-{precision}.safetensors"
    with replacing(folder / file) as temporary:
        save_file(
            {name: tensor.cpu() for name, tensor in tensors.items()},
            temporary,
            metadata={METADATA: json.dumps(header)},
        )
    entry = {
        "weights": file,
        "num_sparse_tokens": config.num_sparse_tokens,
        "num_decoder_layers": config.num_decoder_layers,
        "spatial_temp": config.spatial_temp,
        "backbone": asdict(config.backbone),
    }
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps({"models": {config.name: entry}}, indent=1))


def saved_precision(path: Path) -> str | None:
    """The precision of packed weights; None if `path` is a checkpoint of another kind.

    Raises:
        CheckpointError: packed by a version of this package that wrote another format.
    """
    header = _header(path)
    return None if header is None else header["precision"]


def read(path: Path, device: torch.device) -> tuple[EncoderWeights, DecoderWeights | None]:
    """What `save` wrote, on `device`.

    Raises:
        CheckpointError: the file is damaged.
    """
    header = _header(path)
    assert header is not None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = {name: _build(part, tensors) for name, part in header["structure"].items()}
        return parts["encoder"], parts["decoder"]
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); write it again with Engine.save"
        ) from error


def _header(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError):
        return None  # what is wrong with it is for the reader of checkpoints to say
    if text is None:
        return None
    header = json.loads(text)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was saved in format {header.get('format')}, this version reads {FORMAT}; "
            "save it again from the original checkpoint"
        )
    return header
