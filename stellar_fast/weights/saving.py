"""Packed weights in a file: what `Engine.save` writes and `load` reads back.

A folder in the published layout, `config.json` and one safetensors file, whose metadata says how
its tensors make up the dataclasses of `weights.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError, StellarError, listing
from ..files import parse_json, replacing, writing
from ..precision import DTYPES
from . import checkpoint, int8, names
from .manifest import CONFIG_FILE, write_config
from .pack import Layout, as_it_is, pack_decoder, pack_encoder, pack_vqgan
from .packed import Block, DecoderWeights, EncoderWeights, Fp8Block, Fp8Linear, Linear
from .quantize import FP8
from .residency import let_go

FORMAT = 1
METADATA = "stellar_fast"
AGAIN = "write it again with Engine.save"
# Of the tensors, the first that every encoder has, and the one that a tokenizer has.
PATCH, CODEBOOK = "encoder.patch", "decoder.vqgan.codebook"


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
    write_config(folder, config, file)


def saved_precision(path: Path) -> str | None:
    """The precision of packed weights; None if `path` is a checkpoint of another kind.

    Raises:
        CheckpointError: packed by a version of this package that wrote another format, or damaged.
    """
    header = _header(path)
    return None if header is None else header["precision"]


def read(
    path: Path, config: ModelConfig, device: torch.device, layout: Layout = as_it_is
) -> tuple[EncoderWeights, DecoderWeights | None]:
    """What `save` wrote, on `device`, each linear layer in a layout.

    The file gives values alone. What there is, of which shapes and dtypes, follows from `config`
    and the precision, and the file must hold just that.

    Raises:
        CheckpointError: the file is damaged, or holds another model than `config`; names what.
    """
    header = _header(path)
    assert header is not None
    structure = header["structure"]
    try:
        with checkpoint.opened(path) as file:
            found = set(file.keys())
            half = PATCH in found and file.get_slice(PATCH).get_dtype() == "F16"
            encoder, decoder = _expected(config, header["precision"], half, found)
            expected: dict[str, Tensor] = {}
            _flatten(encoder, "encoder", expected)
            _flatten(decoder, "decoder", expected)
            kinds = {"missing": expected.keys() - found, "unknown": found - expected.keys()}
            wrong = [f"{kind}: {listing(sorted(part))}" for kind, part in kinds.items() if part]
            if wrong:
                raise ValueError("; ".join(wrong))

            def tensor(name: str) -> Tensor:
                return _tensor(file, name, expected[name], device)

            return (
                _build(encoder, structure["encoder"], "encoder", tensor, layout),
                _build(decoder, structure["decoder"], "decoder", tensor, layout),
            )
    except (SafetensorError, OSError, ValueError) as error:
        # Those of the library repeat what the file says, and that may be long.
        what = str(error) if isinstance(error, ValueError) else checkpoint.reason(error)
        raise CheckpointError(
            f"{path} is damaged, or packed for another geometry than {config.name!r} has "
            f"({what}); {AGAIN}"
        ) from error


def _expected(
    config: ModelConfig, precision: str, half: bool, found: Collection[str]
) -> tuple[EncoderWeights, DecoderWeights | None]:
    """What `save` would write of a model, on the meta device: shapes and dtypes without values.

    Args:
        half: whether an fp8 engine keeps float16 beside its FP8 weights, not bfloat16.
        found: names of the tensors there are, which tell whether it has a decoder, and which.
    """
    fp8, meta = precision == "fp8", torch.device("meta")
    dtype = torch.float16 if fp8 and half else DTYPES[precision]

    def state(shapes: names.Shapes) -> dict[str, Tensor]:
        return {name: torch.empty(shape) for name, shape in shapes.items()}

    with meta:
        encoder = pack_encoder(
            state(names.encode_shapes(config)),
            config,
            dtype,
            meta,
            quantize=_quantized if fp8 else None,
        )
        if precision == "int8":
            encoder = int8.unmeasured(encoder)
        if not any(name.startswith("decoder.") for name in found):
            return encoder, None
        vqgan = None
        if CODEBOOK in found:
            vqgan = pack_vqgan(state(names.vqgan_decoder_shapes()), dtype, meta)
        shapes = names.reconstruct_shapes(config, pixel_head=vqgan is None)
        return encoder, pack_decoder(state(shapes), config, vqgan, dtype, meta)


def _quantized(block: Block, dtype: torch.dtype) -> Fp8Block:
    """`quantize_block` on the meta device, where there is nothing to measure."""

    def layer(linear: Linear) -> Fp8Linear:
        scale = torch.empty(len(linear.weight))
        return Fp8Linear(linear.weight.to(FP8), linear.bias.to(dtype), scale)

    return Fp8Block(
        qkv=layer(block.qkv),
        proj=layer(block.proj),
        fc1=layer(block.fc1),
        fc2=layer(block.fc2),
        attended_scale=1.0,
        hidden_scale=1.0,
    )


def _build(
    want: Any, structure: Any, name: str, tensor: Callable[[str], Tensor], layout: Layout
) -> Any:
    """`want` with the file's values, if its header describes just that.

    Args:
        tensor: gives them by name.

    Raises:
        ValueError: it describes something else; names where.
    """
    if isinstance(want, Tensor) and structure == {"tensor": name}:
        return tensor(name)
    if want is None and structure is None:
        return None
    if isinstance(want, float) and isinstance(structure, float) and 0 < structure < math.inf:
        return structure
    if isinstance(want, tuple) and isinstance(structure, list) and len(structure) == len(want):
        items = zip(want, structure, strict=True)
        return tuple(_build(*item, f"{name}.{i}", tensor, layout) for i, item in enumerate(items))
    if is_dataclass(want) and not isinstance(want, type) and isinstance(structure, dict):
        keys = [field.name for field in fields(want)]
        parts = structure.get("fields")
        exact = structure == {"kind": type(want).__name__, "fields": parts}
        if exact and isinstance(parts, dict) and list(parts) == keys:
            values = {
                key: _build(getattr(want, key), parts[key], f"{name}.{key}", tensor, layout)
                for key in keys
            }
            built = type(want)(**values)
            return layout(built) if isinstance(built, Linear) else built
    raise ValueError(f"its header does not describe {name}, a {type(want).__name__}")


def _tensor(file: Any, name: str, want: Tensor, device: torch.device) -> Tensor:
    """A tensor of `want`'s shape and dtype, with finite values; scales are positive."""
    found = file.get_tensor(name)
    if found.shape != want.shape or found.dtype != want.dtype:
        raise ValueError(
            f"{name} is {found.dtype} {tuple(found.shape)} instead of {want.dtype} "
            f"{tuple(want.shape)}"
        )
    tensor = found.to(device, copy=True)  # the file is mapped into memory, and may change
    let_go([found])
    low, high = checkpoint.bounds(tensor)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinity")
    if name.endswith((".scale", ".step", ".channels", ".score_reach")) and low <= 0:
        raise ValueError(f"{name} holds scales that are not positive")
    return tensor


def _header(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            metadata = checkpoint.read_header(path, file.read(512)).get("__metadata__")
    except (CheckpointError, OSError):
        return None  # what is wrong with it is for the reader of checkpoints to say
    if not isinstance(metadata, dict) or METADATA not in metadata:
        return None
    try:
        header = parse_json(metadata[METADATA])
    except (ValueError, TypeError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged (its header is no JSON object); {AGAIN}")
    if header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header.get("format"), int) else "?"
        raise CheckpointError(
            f"{path} was saved in format {found}, this version reads {FORMAT}; save it again from "
            "the original checkpoint"
        )
    structure, precision = header.get("structure"), header.get("precision")
    if not isinstance(structure, dict) or structure.keys() != {"encoder", "decoder"}:
        raise CheckpointError(f"{path} is damaged (its header has no structure); {AGAIN}")
    if not isinstance(precision, str) or precision not in DTYPES:
        raise CheckpointError(f"{path} is damaged (its header names no precision); {AGAIN}")
    return header
