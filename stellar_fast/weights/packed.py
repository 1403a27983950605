"""What the engine reads: packed weights as dataclasses, and what is computed of them by size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIXEL_CENTRE = 0.5
PIXEL_CENTRE_UINT8 = 127.5  # u - 127.5 has 8 significant bits: exact in bfloat16


@dataclass(frozen=True)
class Linear:
    """weight (O, I), bias (O,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Int8Scales:
    """How a product is taken on 8-bit integers, float32.

    What enters is multiplied by channels (I,), if there are any, and takes one of 256 values from
    reach[0] to reach[1]; step (O,) is what one of each output channel's weights stands for.
    """

    step: Tensor
    channels: Tensor | None
    reach: Tensor


@dataclass(frozen=True)
class Int8Linear(Linear):
    """weight (O, I) int8, for inputs that `scales` multiply and round; bias (O,)."""

    scales: Int8Scales


@dataclass(frozen=True)
class Norm:
    """weight (D,), bias (D,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Block:
    """One pre-norm ViT block. qkv (3 D, D), proj (D, D), fc1 (M, D), fc2 (D, M)."""

    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class Fp8Linear:
    """weight (O, I) e4m3, bias (O,), scale (O,) float32: the channel's own, times the static scale
    of what enters where that has one."""

    weight: Tensor
    bias: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Fp8Block:
    """A block with FP8 products; static scales of what attention and the MLP's GELU give."""

    qkv: Fp8Linear
    proj: Fp8Linear
    fc1: Fp8Linear
    fc2: Fp8Linear
    attended_scale: float
    hidden_scale: float


@dataclass(frozen=True)
class LastBlock:
    """The last block, its query apart, so that it can run on the wanted rows alone."""

    query: Linear
    key_value: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class Int8Block(Block):
    """A block on integers. score_reach (2,) float32, of queries as attention scales them, and of
    keys: each take 256 values, zero among them, from -r to r * 127 / 128."""

    score_reach: Tensor


@dataclass(frozen=True)
class Int8LastBlock(LastBlock):
    """The last block on integers; score_reach (2,) as of `Int8Block`."""

    score_reach: Tensor


@dataclass(frozen=True)
class PatchTable:
    """What the position table of any image size is made from, in float32.

    cls (1, D) with its position; positions (grid, grid, D); shift (D,), to be added to every
    patch's position.
    """

    cls: Tensor
    positions: Tensor
    shift: Tensor

    def table(self, rows: int, columns: int) -> Tensor:
        """(1 + rows * columns, D): CLS, then the positions resized to the grid, row by row."""
        positions = self.positions
        if positions.shape[:2] != (rows, columns):
            positions = F.interpolate(
                positions.permute(2, 0, 1)[None],
                size=(rows, columns),
                mode="bicubic",
                align_corners=False,
            )[0].permute(1, 2, 0)
        patches = positions.reshape(rows * columns, -1).double()
        centred = patches - patches.mean(-1, keepdim=True) + self.shift.double()
        return torch.cat([self.cls.double(), centred]).float()


@dataclass(frozen=True)
class EncoderWeights:
    """sparse_tokens (K, D); patch (D, 3 p²) takes pixels in [0, 1] less `PIXEL_CENTRE`, and
    patch_uint8 pixels in 0..255 less `PIXEL_CENTRE_UINT8`."""

    patch: Tensor
    patch_uint8: Tensor
    table: PatchTable
    sparse_tokens: Tensor
    blocks: tuple[Block | Fp8Block, ...]
    last: LastBlock
    norm: Norm
    dense_proj: Linear
    sparse_proj: Linear


@dataclass(frozen=True)
class ResBlock:
    """Two 3x3 convolutions of the VQGAN; its shortcut is folded into conv2 (`_res_block`)."""

    norm1: Norm
    conv1: Tensor
    norm2: Norm
    conv2: Tensor


@dataclass(frozen=True)
class VQGANWeights:
    """The VQGAN's decoder: `levels` coarsest first; `upsample[i]` follows `levels[i]`, the last
    level has none."""

    codebook: Tensor
    conv_in: Linear
    mid: tuple[ResBlock, ...]
    levels: tuple[tuple[ResBlock, ...], ...]
    upsample: tuple[Linear, ...]
    norm_out: Norm
    conv_out: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """decoder_proj (512, D), fourier (2, 256); `head` is the token head (1024, 512) or, without
    `vqgan`, the pixel head."""

    decoder_proj: Linear
    fourier: Tensor
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    vqgan: VQGANWeights | None


def map_nodes(node: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """A dataclass of this module, or a tuple, with `function` applied to every `kind` in it."""
    if isinstance(node, kind):
        return function(node)
    if isinstance(node, tuple):
        return tuple(map_nodes(item, kind, function) for item in node)
    if is_dataclass(node) and not isinstance(node, type):
        parts = {f.name: map_nodes(getattr(node, f.name), kind, function) for f in fields(node)}
        return type(node)(**parts)
    return node


def position_code(fourier: Tensor, rows: int, columns: int) -> Tensor:
    """Random-Fourier code of a grid's cells, centred over the width: (rows * columns, 512) float32.

    Cell (i, j) has c = 2 ((j + 1/2) / columns, (i + 1/2) / rows) - 1, x first, and a = 2 pi c G;
    the code is sin a0, cos a0, sin a1, cos a1, ...  `fourier` is the checkpoint's G, (2, 256).
    """
    y = (torch.arange(rows, dtype=torch.float64, device=fourier.device) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64, device=fourier.device) + 0.5) / columns
    cells = torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)
    angles = 2 * math.pi * (2 * cells - 1) @ fourier.double()
    code = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    return (code - code.mean(-1, keepdim=True)).float()
