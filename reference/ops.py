"""The ops of STELLAR's forward pass in plain PyTorch, one function for each kernel.

These are the oracles of the kernels, which have the same names and signatures. They compute in the
dtype of their inputs, as the published modules do, fuse nothing, and take any device and strides.
Shapes: B images, P patches, K sparse tokens, S = 1 + P + K, D channels.

Rows of the residual stream have mean 0, so a LayerNorm needs of them only Σx². Ops that write the
stream return it too, as `sums` (T, B, S): T partial sums for each row, in float32 at least.

FP8 is e4m3. A quantized matrix stands for `weight * weight_scale`, one scale for each output
channel, and quantized rows for `x * x_scale`; a static scale of x is part of `weight_scale`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import NORMALIZE_EPS

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def _sums(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1)[None]


def _quantize(x: Tensor, scale: float | Tensor) -> Tensor:
    """x / scale in e4m3, held within its range."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    sparse_tokens: Tensor,
    patch_size: int,
    centre: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The sequence [CLS | patches | sparse] that enters the first block.

    Args:
        images: (B, 3, H, W) uint8 or float; rows and columns beyond a whole patch are dropped.
        weight: (D, 3 * patch_size**2), a convolution's weight flattened channel, row, column.
        table: (1 + P, D). Row 0 is the CLS token with its position, row 1 + i what patch i is added
            to.
        sparse_tokens: (K, D), appended as they are: they have no position.
        centre: subtracted from every pixel, before the pixels are rounded to `weight`'s dtype.

    Returns:
        x (B, 1 + P + K, D) in `weight`'s dtype, and its sums.
    """
    batch, _, height, width = images.shape
    cropped = images[:, :, : height - height % patch_size, : width - width % patch_size]
    tiles = rearrange(
        cropped,
        "b c (rows y) (columns x) -> b (rows columns) (c y x)",
        y=patch_size,
        x=patch_size,
    )
    if centre:
        tiles = tiles.to(torch.promote_types(tiles.dtype, torch.float32)) - centre
    tiles = tiles.to(weight.dtype)
    cls = table[:1].expand(batch, -1, -1)
    x = torch.cat(
        [cls, F.linear(tiles, weight) + table[1:], sparse_tokens.expand(batch, -1, -1)], dim=1
    ).to(weight.dtype)
    return x, _sums(x)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lengths: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """LayerNorm of rows whose mean is 0: `x / sqrt(mean(x²) + eps) * weight + bias`.

    Args:
        x: (B, S, D).
        weight: (D,).
        bias: (D,).
        lengths: the sequence is cut into parts of these lengths, S in all.

    Returns:
        (B, length, D) in `out_dtype` for each of `lengths`.
    """
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight + bias
    return y.to(out_dtype).split(list(lengths), dim=1)


def quantize_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows divided by `sqrt(mean(x²) + eps)`, in FP8 with a scale for each row.

    Args:
        x: (B, S, D).

    Returns:
        e4m3 (B, S, D), its largest magnitude in each row 448; and scale (B, S) float32, of float64
            rows float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(-1, keepdim=True)
    rms = torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    quantized = _quantize(x, torch.where(largest > 0, largest / FP8_MAX, 1.0))
    return quantized, (largest / FP8_MAX / rms)[..., 0]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_eps: float | None = None,
    sums: Tensor | None = None,
    gelu: bool = False,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_scale: float | None = None,
) -> Tensor:
    """`act(rms(x) @ weightᵀ + bias)`, with rms and act only when asked for.

    Args:
        x: (B, S, I).
        weight: (O, I).
        bias: (O,).
        norm_eps: when given, rows of x are first divided by `sqrt(mean(x²) + norm_eps)`.
        sums: of x, from the op that wrote it; without it a backend takes them itself.
        gelu: apply the exact (erf) GELU.
        x_scale: (B, S) float32, of quantized rows.
        weight_scale: (O,) float32, of a quantized weight.
        out_scale: when given, the result is quantized with this static scale.

    Returns:
        (B, S, O) in `bias`'s dtype, or e4m3 with `out_scale`.
    """
    if weight_scale is not None:
        x, weight = _dequantized(x, weight, x_scale, weight_scale, bias.dtype)
    if norm_eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    return y if out_scale is None else _quantize(y, out_scale)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`x @ weightᵀ + bias + residual`: what writes to the residual stream.

    Args:
        x: (B, S, I), weight: (O, I), bias: (O,), residual: (B, S, O).
        weight_scale: (O,) float32, of a quantized weight and the static scale of a quantized x.

    Returns:
        (B, S, O) in `residual`'s dtype, and its sums.
    """
    if weight_scale is not None:
        x, weight = _dequantized(x, weight, None, weight_scale, bias.dtype)
    y = F.linear(x, weight, bias) + residual
    return y, _sums(y)


def _dequantized(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, weight_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(dtype, torch.float32))
    if x_scale is not None:
        x = x * x_scale[..., None]
    return x.to(dtype), (weight.to(x.dtype) * weight_scale[:, None]).to(dtype)


def attention(
    query: Tensor, key_value: Tensor, num_heads: int, *, out_scale: float | None = None
) -> Tensor:
    """Softmax attention without a mask, scaled by `head_dim**-0.5`.

    Args:
        query: (B, Q, D), heads side by side in D.
        key_value: (B, S, 2 D): keys, then values. Both arguments may be views into one packed qkv.
        out_scale: when given, the result is quantized with this static scale.

    Returns:
        (B, Q, D) in `query`'s dtype, or e4m3 with `out_scale`.
    """
    q = rearrange(query, "b s (heads d) -> b heads s d", heads=num_heads)
    k, v = rearrange(key_value, "b s (kv heads d) -> kv b heads s d", kv=2, heads=num_heads)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    y = rearrange(scores.softmax(dim=-1) @ v, "b heads s d -> b s (heads d)")
    return y if out_scale is None else _quantize(y, out_scale)


def spatial_map(
    dense: Tensor,
    sparse: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    sparse_weight: Tensor,
    sparse_bias: Tensor,
    temperature: float | None,
    *,
    lowrank: bool,
) -> tuple[Tensor, Tensor | None]:
    """Which sparse token each patch belongs to: a softmax over the K tokens, so rows sum to 1.

    Args:
        dense: (B, P, D).
        sparse: (B, K, D).
        dense_weight, sparse_weight: (D, D); dense_bias, sparse_bias: (D,).
        temperature: divisor of the cosine similarities; None takes plain dot products over
            `sqrt(D)`.
        lowrank: whether to return `reassemble(spatial, sparse)` too.

    Returns:
        spatial (B, P, K), and lowrank (B, P, D) or None; in `dense`'s dtype, which may be wider
        than the weights', in which the products are taken.
    """
    d = F.linear(dense.to(dense_weight.dtype), dense_weight, dense_bias)
    s = F.linear(sparse.to(sparse_weight.dtype), sparse_weight, sparse_bias)
    if temperature is None:
        temperature = d.shape[-1] ** 0.5
    else:
        d, s = F.normalize(d, dim=-1, eps=NORMALIZE_EPS), F.normalize(s, dim=-1, eps=NORMALIZE_EPS)
    spatial = (d @ s.transpose(-2, -1) / temperature).softmax(dim=-1).to(dense.dtype)
    return spatial, reassemble(spatial, sparse) if lowrank else None


def reassemble(spatial: Tensor, sparse: Tensor) -> Tensor:
    """The low-rank dense features `spatial @ sparse`.

    Args:
        spatial: (B, P, K).
        sparse: (B, K, D).

    Returns:
        (B, P, D).
    """
    return spatial @ sparse
