"""STELLAR's reconstruction decoder over packed weights and an injected `ops` namespace."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LAYER_NORM_EPS, ModelConfig
from ..weights.packed import DecoderWeights
from .encoder import run_block
from .ops import Ops
from .vqgan import decode_codes


def square_grid(patches: int) -> int:
    """Side of the square grid of `patches` cells.

    Raises:
        ValueError: `patches` is no square number; the decoder's position code is that of a square
            grid.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"reconstruct needs features of a square grid of patches, got {patches} patches "
            "an image; encode square images"
        )
    return side


def reconstruct(
    ops: Ops, weights: DecoderWeights, config: ModelConfig, lowrank: Tensor, code: Tensor
) -> dict[str, Tensor]:
    """Pixels from low-rank features.

    Args:
        lowrank: (B, P, D), P a square number.
        code: (h, h, 512), the grid's position code in `lowrank`'s dtype; h = sqrt(P).

    Returns:
        With the tokenizer: reconstruction (B, 3, 16 h, 16 h) in [0, 1], tokens (B, P) int64,
            logits (B, P, 1024).
        With the pixel head: reconstruction (B, 3, p h, p h) alone, not clamped.
    """
    side = code.shape[0]
    project = weights.decoder_proj
    x, sums = ops.linear_residual(
        lowrank,
        project.weight,
        project.bias,
        code.flatten(0, 1).expand(lowrank.shape[0], -1, -1),
    )
    for block in weights.blocks:
        x, sums = run_block(ops, block, x, sums, config.decoder.num_attention_heads)
    norm = weights.norm
    (x,) = ops.norm(x, norm.weight, norm.bias, LAYER_NORM_EPS, (x.shape[1],), x.dtype)
    if weights.vqgan is None:
        grid = x.transpose(1, 2).unflatten(2, (side, side))
        pixels = F.conv_transpose2d(
            grid, weights.head.weight, weights.head.bias, stride=config.backbone.patch_size
        )
        return {"reconstruction": pixels}
    logits = ops.linear(x, weights.head.weight, weights.head.bias)
    tokens = logits.argmax(-1)
    pixels = decode_codes(weights.vqgan, tokens.unflatten(1, (side, side)))
    return {"reconstruction": torch.clamp(pixels, 0, 1), "tokens": tokens, "logits": logits}
