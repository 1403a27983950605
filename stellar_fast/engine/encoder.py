"""STELLAR's encoder over packed weights and an injected `ops` namespace."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..config import LAYER_NORM_EPS, ModelConfig
from ..weights.packed import (
    PIXEL_CENTRE,
    PIXEL_CENTRE_UINT8,
    Block,
    EncoderWeights,
    Fp8Block,
    LastBlock,
)

OUTPUTS = ("sparse", "spatial", "dense", "lowrank", "cls")
# Given where they are asked for: each is made of the others.
DERIVED = {"concat": ("sparse", "spatial"), "peak_dist": ("spatial",)}


def with_parts(outputs: Collection[str]) -> set[str]:
    """`outputs`, and what of `OUTPUTS` the derived ones among them are made of."""
    return {*outputs, *(part for name in outputs for part in DERIVED.get(name, ()))}


def wanted_rows(outputs: Collection[str], patches: int, tokens: int) -> dict[str, slice]:
    """What of the sequence [CLS | patches | sparse] `outputs` need of the last block, in order."""
    parts = {
        "cls": slice(0, 1),
        "dense": slice(1, 1 + patches),
        "sparse": slice(1 + patches, 1 + patches + tokens),
    }
    needed = with_parts(outputs)
    if needed & {"spatial", "lowrank"}:
        needed |= {"dense", "sparse"}
    return {name: part for name, part in parts.items() if name in needed}


def run_block(
    ops, block: Block, x: Tensor, sums: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor | None]:
    """One ViT block: x (B, S, D) and the sums of squares of its rows -> the same."""
    width = x.shape[-1]
    qkv = ops.linear(x, block.qkv.weight, block.qkv.bias, norm_eps=LAYER_NORM_EPS, sums=sums)
    a = ops.attention(qkv[..., :width], qkv[..., width:], num_heads)
    x, sums = ops.linear_residual(a, block.proj.weight, block.proj.bias, x)
    h = ops.linear(
        x, block.fc1.weight, block.fc1.bias, norm_eps=LAYER_NORM_EPS, sums=sums, gelu=True
    )
    return ops.linear_residual(h, block.fc2.weight, block.fc2.bias, x)


def run_fp8_block(ops, block: Fp8Block, x: Tensor, num_heads: int) -> tuple[Tensor, Tensor | None]:
    """`run_block` with FP8 products: rows are quantized behind each norm, what attention and GELU
    give by the block's static scales."""
    width = x.shape[-1]
    qkv, proj, fc1, fc2 = block.qkv, block.proj, block.fc1, block.fc2
    rows, scale = ops.quantize_rows(x, LAYER_NORM_EPS)
    packed = ops.linear(rows, qkv.weight, qkv.bias, x_scale=scale, weight_scale=qkv.scale)
    a = ops.attention(
        packed[..., :width], packed[..., width:], num_heads, out_scale=block.attended_scale
    )
    x, _ = ops.linear_residual(a, proj.weight, proj.bias, x, weight_scale=proj.scale)
    rows, scale = ops.quantize_rows(x, LAYER_NORM_EPS)
    h = ops.linear(
        rows,
        fc1.weight,
        fc1.bias,
        gelu=True,
        x_scale=scale,
        weight_scale=fc1.scale,
        out_scale=block.hidden_scale,
    )
    return ops.linear_residual(h, fc2.weight, fc2.bias, x, weight_scale=fc2.scale)


def run_last_block(
    ops,
    block: LastBlock,
    x: Tensor,
    sums: Tensor | None,
    rows: Collection[slice],
    num_heads: int,
) -> Tensor:
    """The last block on `rows` alone, attending to all: (B, S, D) -> (B, wanted rows, D)."""
    key_value = ops.linear(
        x, block.key_value.weight, block.key_value.bias, norm_eps=LAYER_NORM_EPS, sums=sums
    )
    if sum(part.stop - part.start for part in rows) < x.shape[1]:
        x = torch.cat([x[:, part] for part in rows], dim=1)
        if sums is not None:
            sums = torch.cat([sums[:, :, part] for part in rows], dim=2)
    query = ops.linear(x, block.query.weight, block.query.bias, norm_eps=LAYER_NORM_EPS, sums=sums)
    a = ops.attention(query, key_value, num_heads)
    x, sums = ops.linear_residual(a, block.proj.weight, block.proj.bias, x)
    h = ops.linear(
        x, block.fc1.weight, block.fc1.bias, norm_eps=LAYER_NORM_EPS, sums=sums, gelu=True
    )
    x, _ = ops.linear_residual(h, block.fc2.weight, block.fc2.bias, x)
    return x


def encode(
    ops,
    weights: EncoderWeights,
    config: ModelConfig,
    images: Tensor,
    table: Tensor,
    outputs: Collection[str],
    out_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What of `OUTPUTS` and `DERIVED` is asked for, and no more.

    Args:
        images: (B, 3, H, W), uint8 or floats in [0, 1].
        table: (1 + P, D) float32, `weights.table.table(H // patch, W // patch)`.
        out_dtype: of the features; spatial and lowrank may come wider.

    Returns:
        sparse (B, K, D), spatial (B, P, K), dense (B, P, D), lowrank (B, P, D), cls (B, 1, D),
        concat (B, K, D + P), peak_dist (B, K); they may be views of one another's memory.
    """
    backbone = config.backbone
    heads, tokens = backbone.num_attention_heads, config.num_sparse_tokens
    patches = table.shape[0] - 1
    rows = wanted_rows(outputs, patches, tokens)
    if images.dtype == torch.uint8:
        patch, centre = weights.patch_uint8, PIXEL_CENTRE_UINT8
    else:
        patch, centre = weights.patch, PIXEL_CENTRE

    x, sums = ops.patch_embed(
        images, patch, table, weights.sparse_tokens, backbone.patch_size, centre
    )
    for block in weights.blocks:
        if isinstance(block, Fp8Block):
            x, sums = run_fp8_block(ops, block, x, heads)
        else:
            x, sums = run_block(ops, block, x, sums, heads)
    x = run_last_block(ops, weights.last, x, sums, rows.values(), heads)

    lengths = [part.stop - part.start for part in rows.values()]
    norm = weights.norm
    parts = ops.norm(x, norm.weight, norm.bias, LAYER_NORM_EPS, lengths, out_dtype)
    features = dict(zip(rows, parts, strict=True))
    if with_parts(outputs) & {"spatial", "lowrank"}:
        features["spatial"], features["lowrank"] = ops.spatial_map(
            features["dense"],
            features["sparse"],
            weights.dense_proj.weight,
            weights.dense_proj.bias,
            weights.sparse_proj.weight,
            weights.sparse_proj.bias,
            config.spatial_temp,
            lowrank="lowrank" in outputs,
        )
    if "concat" in outputs:
        sparse, maps = features["sparse"], features["spatial"].transpose(1, 2)
        features["concat"] = torch.cat([sparse, maps.to(sparse.dtype)], dim=2)
    if "peak_dist" in outputs:
        features["peak_dist"] = features["spatial"].amax(1)
    return {name: features[name] for name in (*OUTPUTS, *DERIVED) if name in outputs}
