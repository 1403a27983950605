"""The MaskGIT-VQGAN's decoder over packed weights: codes to pixels.

Convolutions are PyTorch's (cuDNN, oneDNN). The residual block's shortcut is already inside `conv2`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..weights.packed import Linear, Norm, ResBlock, VQGANWeights

GROUPS = 32
EPS = 1e-6


def _conv(x: Tensor, layer: Linear) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def _norm_silu(x: Tensor, norm: Norm) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, norm.weight, norm.bias, EPS), inplace=True)


def _res_block(x: Tensor, block: ResBlock) -> Tensor:
    h = F.conv2d(_norm_silu(x, block.norm1), block.conv1, padding=1)
    h = F.conv2d(_norm_silu(h, block.norm2), block.conv2, padding=1)
    return x + h if x.shape[1] == h.shape[1] else h


def decode_codes(weights: VQGANWeights, codes: Tensor) -> Tensor:
    """(B, h, w) int64 codes -> (B, 3, 16 h, 16 w) pixels, unclamped."""
    x = F.embedding(codes, weights.codebook).permute(0, 3, 1, 2).contiguous()
    x = _conv(x, weights.conv_in)
    for block in weights.mid:
        x = _res_block(x, block)
    for level, blocks in enumerate(weights.levels):
        for block in blocks:
            x = _res_block(x, block)
        if level < len(weights.upsample):
            x = _conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), weights.upsample[level])
    return _conv(_norm_silu(x, weights.norm_out), weights.conv_out)
