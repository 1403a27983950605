"""The ops of STELLAR's forward pass in plain PyTorch, one function for each kernel.

These are the oracles of the kernels, which have the same names and signatures. They compute in the
dtype of their inputs, as the published modules do, fuse nothing, and take any device and strides.
Shapes: B images, P patches, K sparse tokens, S = 1 + P + K, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import NORMALIZE_EPS


def patch_embed(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    sparse_tokens: Tensor,
    patch_size: int,
    centre: float = 0.0,
) -> Tensor:
    """The sequence [CLS | patches | sparse] that enters the first block.

    Args:
        images: (B, 3, H, W) uint8 or float; rows and columns beyond a whole patch are dropped.
        weight: (D, 3 * patch_size**2), a convolution's weight flattened channel, row, column.
        table: (1 + P, D). Row 0 is the CLS token with its position, row 1 + i what patch i is added
            to.
        sparse_tokens: (K, D), appended as they are: they have no position.
        centre: subtracted from every pixel, before the pixels are rounded to `weight`'s dtype.

    Returns:
        (B, 1 + P + K, D).
    """
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cropped = images[:, :, : rows * patch_size, : columns * patch_size]
    tiles = cropped.reshape(batch, 3, rows, patch_size, columns, patch_size)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, 3 * patch_size**2)
    if centre:
        tiles = tiles.to(torch.promote_types(tiles.dtype, torch.float32)) - centre
    tiles = tiles.to(weight.dtype)
    cls = table[:1].expand(batch, -1, -1)
    return torch.cat(
        [cls, F.linear(tiles, weight) + table[1:], sparse_tokens.expand(batch, -1, -1)], dim=1
    )


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of rows whose mean is 0: `x / sqrt(mean(x²) + eps) * weight + bias`.

    Args:
        x: (..., D).
        weight: (D,).
        bias: (D,).
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight + bias


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_eps: float | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`act(rms(x) @ weightᵀ + bias) + residual`, each of rms, act and residual only when asked for.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,).
        norm_eps: when given, rows of x are first divided by `sqrt(mean(x²) + norm_eps)`.
        gelu: apply the exact (erf) GELU.
        residual: (..., O), added last.

    Returns:
        (..., O).
    """
    if norm_eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    return y if residual is None else y + residual


def attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Softmax attention without a mask, scaled by `head_dim**-0.5`.

    Args:
        query: (B, Q, D), heads side by side in D.
        key_value: (B, S, 2 D): keys, then values. Both arguments may be views into one packed qkv.

    Returns:
        (B, Q, D).
    """
    batch, rows, width = query.shape
    head = (num_heads, width // num_heads)
    q = query.unflatten(-1, head).transpose(1, 2)
    k = key_value[..., :width].unflatten(-1, head).transpose(1, 2)
    v = key_value[..., width:].unflatten(-1, head).transpose(1, 2)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, rows, width)


def spatial_map(
    dense: Tensor,
    sparse: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    sparse_weight: Tensor,
    sparse_bias: Tensor,
    temperature: float | None,
) -> Tensor:
    """Which sparse token each patch belongs to: a softmax over the K tokens, so rows sum to 1.

    Args:
        dense: (B, P, D).
        sparse: (B, K, D).
        dense_weight, sparse_weight: (D, D); dense_bias, sparse_bias: (D,).
        temperature: divisor of the cosine similarities; None takes plain dot products over
            `sqrt(D)`.

    Returns:
        (B, P, K).
    """
    d = F.linear(dense, dense_weight, dense_bias)
    s = F.linear(sparse, sparse_weight, sparse_bias)
    if temperature is None:
        temperature = d.shape[-1] ** 0.5
    else:
        d, s = F.normalize(d, dim=-1, eps=NORMALIZE_EPS), F.normalize(s, dim=-1, eps=NORMALIZE_EPS)
    return (d @ s.transpose(-2, -1) / temperature).softmax(dim=-1)


def reassemble(spatial: Tensor, sparse: Tensor) -> Tensor:
    """The low-rank dense features `spatial @ sparse`.

    Args:
        spatial: (B, P, K).
        sparse: (B, K, D).

    Returns:
        (B, P, D).
    """
    return spatial @ sparse
