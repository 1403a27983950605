"""The smallest model that has every part, its files, and edits of a safetensors file's header."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import synthetic

from stellar_fast.config import BackboneConfig, ModelConfig
from stellar_fast.precision import DTYPES
from stellar_fast.weights import names, saving
from stellar_fast.weights.pack import pack_decoder, pack_encoder
from stellar_fast.weights.quantize import quantize_block

BACKBONE = BackboneConfig(32, 3, 2, 48, 4, 16)
CONFIG = ModelConfig("tiny", BACKBONE, 2, 1, weights="tiny.safetensors")
CPU = torch.device("cpu")


def save_packed(folder: Path, precision: str, *, decoder: bool = False) -> Path:
    """Packed weights of `CONFIG` as an engine saves them; the weights file."""
    dtype = DTYPES[precision]
    shapes = names.encode_shapes(CONFIG) | names.reconstruct_shapes(CONFIG, pixel_head=True)
    state = synthetic(shapes, 3)
    quantize = quantize_block if precision == "fp8" else None
    encode = pack_encoder(state, CONFIG, dtype, CPU, quantize=quantize)
    decode = pack_decoder(state, CONFIG, None, dtype, CPU) if decoder else None
    saving.save(folder, CONFIG, precision, encode, decode)
    return folder / f"tiny-{precision}.safetensors"


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: str | bytes, values: bytes) -> None:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + values)


def edit_packed(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes the description that an engine left in the metadata of its weights file."""
    header, values = split(path)
    packed = json.loads(header["__metadata__"][saving.METADATA])
    edit(packed)
    header["__metadata__"][saving.METADATA] = json.dumps(packed)
    join(path, json.dumps(header), values)
