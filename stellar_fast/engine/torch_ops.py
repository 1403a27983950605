"""The ops of the torch backend: those of `reference.ops`, by PyTorch's fused inference paths.

On CPUs with oneDNN the linear layers carry bias, erf-GELU and residual add in the matrix product,
on weights laid out once for the machine's vector or matrix units (`laid_out`). Softmax and norms of
the spatial map are float32. There is no FP8 here, and no sums of squares are passed on: these paths
take their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import NORMALIZE_EPS
from ..weights.packed import Linear, map_nodes


def _onednn_runs(weight: Tensor) -> bool:
    """Whether oneDNN's fused linear takes this weight on this machine."""
    if weight.device.type != "cpu" or weight.dim() != 2 or not torch.backends.mkldnn.is_available():
        return False
    match weight.dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        case torch.float16:
            return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def laid_out(layer: Linear, rows: int) -> Linear:
    """`layer` as this machine's matrix product reads it.

    Args:
        rows: rows that a product will typically have; a hint for the layout, any number stays
            right.
    """
    if layer.weight.is_mkldnn or not _onednn_runs(layer.weight):
        return layer
    return Linear(torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows), layer.bias)


def restore(weights: Any) -> Any:
    """`weights` as they were before they were `laid_out`."""

    def unpack(layer: Linear) -> Linear:
        weight = layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight
        return Linear(weight, layer.bias)

    return map_nodes(weights, Linear, unpack)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    sparse_tokens: Tensor,
    patch_size: int,
    centre: float = 0.0,
) -> tuple[Tensor, None]:
    """`reference.ops.patch_embed`."""
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = rows * columns
    cropped = images[:, :, : rows * patch_size, : columns * patch_size]
    if centre:
        cropped = cropped.to(torch.promote_types(images.dtype, torch.float32)) - centre
    tiles = images.new_empty((batch, patches, weight.shape[1]), dtype=weight.dtype)
    tiles.view(batch, rows, columns, 3, patch_size, patch_size).copy_(
        cropped.unfold(2, patch_size, patch_size)
        .unfold(3, patch_size, patch_size)
        .permute(0, 2, 3, 1, 4, 5)
    )
    x = tiles.new_empty((batch, 1 + patches + sparse_tokens.shape[0], weight.shape[0]))
    x[:, :1] = table[:1]
    # The table is float32 whatever the model's dtype: the sum is rounded once.
    torch.add(F.linear(tiles, weight), table[1:], out=x[:, 1 : 1 + patches])
    x[:, 1 + patches :] = sparse_tokens
    return x, None


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lengths: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """`reference.ops.norm` as a LayerNorm, which also takes out what rounding left of the mean."""
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y.to(out_dtype).split(list(lengths), dim=1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_eps: float | None = None,
    sums: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """`reference.ops.linear`; `weight` may be that of a layer `laid_out`."""
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], None, None, norm_eps)
    if weight.is_mkldnn:
        post = "gelu" if gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], "none")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
) -> tuple[Tensor, None]:
    """`reference.ops.linear_residual`; `weight` may be that of a layer `laid_out`."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add"), None
    return F.linear(x, weight, bias).add_(residual), None


def attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """`reference.ops.attention`, by PyTorch's fused scaled-dot-product attention."""
    batch, rows, width = query.shape
    head = (num_heads, width // num_heads)
    q = query.unflatten(-1, head).transpose(1, 2)
    k = key_value[..., :width].unflatten(-1, head).transpose(1, 2)
    v = key_value[..., width:].unflatten(-1, head).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, width)


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
    """`reference.ops.spatial_map`; logits and softmax in float32, which `spatial` keeps.

    A temperature of 0.06 multiplies an error of the cosine by 16.7, and bfloat16 logits near 16
    step by 0.125.
    """
    d = linear(dense.to(dense_bias.dtype), dense_weight, dense_bias).float()
    s = linear(sparse.to(sparse_bias.dtype), sparse_weight, sparse_bias).float()
    if temperature is None:
        spatial = torch.baddbmm(
            d.new_zeros(()), d, s.transpose(1, 2), beta=0, alpha=d.shape[-1] ** -0.5
        ).softmax(-1)
    else:
        scale = torch.linalg.vector_norm(d, dim=-1, keepdim=True).clamp_min(NORMALIZE_EPS)
        s = F.normalize(s, dim=-1, eps=NORMALIZE_EPS)
        spatial = (torch.bmm(d, s.transpose(1, 2)) / (scale * temperature)).softmax(-1)
    return spatial, reassemble(spatial, sparse) if lowrank else None


def reassemble(spatial: Tensor, sparse: Tensor) -> Tensor:
    """`reference.ops.reassemble`; computed and returned in the wider of the two dtypes."""
    dtype = torch.promote_types(spatial.dtype, sparse.dtype)
    return torch.bmm(spatial.to(dtype), sparse.to(dtype))
