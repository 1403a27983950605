"""STELLAR's encoder over packed weights and an injected `ops` namespace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..config import LAYER_NORM_EPS, ModelConfig
from ..weights.packed import (
    PIXEL_CENTRE,
    PIXEL_CENTRE_UINT8,
    Block,
    EncoderWeights,
    Fp8Block,
    Int8Block,
    Int8LastBlock,
    Int8Linear,
    LastBlock,
    Linear,
)
from .ops import Fp8Ops, Ops

OUTPUTS = ("sparse", "spatial", "dense", "lowrank", "cls")
PARTS = 3  # of the sequence: CLS, patches, sparse tokens
# Given where they are asked for: each is made of the others.
DERIVED = {"concat": ("sparse", "spatial"), "peak_dist": ("spatial",)}


def with_parts(outputs: Collection[str]) -> set[str]:
    """`outputs`, and what of `OUTPUTS` the derived ones among them are made of."""
    return {*outputs, *(part for name in outputs for part in DERIVED.get(name, ()))}


def derived(features: Mapping[str, Tensor], outputs: Collection[str]) -> dict[str, Tensor]:
    """What of `DERIVED` is asked for, of the features that it is made of."""
    found = {}
    if "concat" in outputs:
        sparse, maps = features["sparse"], features["spatial"].transpose(1, 2)
        found["concat"] = torch.cat([sparse, maps.to(sparse.dtype)], dim=2)
    if "peak_dist" in outputs:
        found["peak_dist"] = features["spatial"].amax(1)
    return found


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


def _linear(ops, x: Tensor, layer: Linear, **keywords: Any) -> Tensor:
    if isinstance(layer, Int8Linear):
        keywords["int8"] = layer.scales
    return ops.linear(x, layer.weight, layer.bias, **keywords)


def _residual(ops, x: Tensor, layer: Linear, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    keywords = {"int8": layer.scales} if isinstance(layer, Int8Linear) else {}
    return ops.linear_residual(x, layer.weight, layer.bias, residual, **keywords)


def _attention(ops, block: Block | LastBlock, query: Tensor, key_value: Tensor, heads: int) -> Any:
    keywords = {"int8": block.score_reach} if isinstance(block, Int8Block | Int8LastBlock) else {}
    return ops.attention(query, key_value, heads, **keywords)


def run_block(
    ops: Ops, block: Block, x: Tensor, sums: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor | None]:
    """One ViT block: x (B, S, D) and the sums of squares of its rows -> the same."""
    width = x.shape[-1]
    qkv = _linear(ops, x, block.qkv, norm_eps=LAYER_NORM_EPS, sums=sums)
    a = _attention(ops, block, qkv[..., :width], qkv[..., width:], num_heads)
    x, sums = _residual(ops, a, block.proj, x)
    h = _linear(ops, x, block.fc1, norm_eps=LAYER_NORM_EPS, sums=sums, gelu=True)
    return _residual(ops, h, block.fc2, x)


def run_fp8_block(
    ops: Fp8Ops, block: Fp8Block, x: Tensor, num_heads: int
) -> tuple[Tensor, Tensor | None]:
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
    ops: Ops,
    block: LastBlock,
    x: Tensor,
    sums: Tensor | None,
    rows: Collection[slice],
    num_heads: int,
) -> Tensor:
    """The last block on `rows` alone, attending to all: (B, S, D) -> (B, wanted rows, D)."""
    key_value = _linear(ops, x, block.key_value, norm_eps=LAYER_NORM_EPS, sums=sums)
    if len(rows) < PARTS:
        x = torch.cat([x[:, part] for part in rows], dim=1)
        if sums is not None:
            sums = torch.cat([sums[:, :, part] for part in rows], dim=2)
    query = _linear(ops, x, block.query, norm_eps=LAYER_NORM_EPS, sums=sums)
    a = _attention(ops, block, query, key_value, num_heads)
    x, sums = _residual(ops, a, block.proj, x)
    h = _linear(ops, x, block.fc1, norm_eps=LAYER_NORM_EPS, sums=sums, gelu=True)
    return _residual(ops, h, block.fc2, x)[0]


def embed(
    ops, weights: EncoderWeights, config: ModelConfig, images: Tensor, table: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What enters the first block, and its sums of squares; arguments as of `encode`."""
    if images.dtype == torch.uint8:
        patch, centre = weights.patch_uint8, PIXEL_CENTRE_UINT8
    else:
        patch, centre = weights.patch, PIXEL_CENTRE
    size = config.backbone.patch_size
    return ops.patch_embed(images, patch, table, weights.sparse_tokens, size, centre)


def encode(
    ops: Ops,
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
    x, sums = run_blocks(ops, weights, config, *embed(ops, weights, config, images, table))
    patches = table.shape[0] - 1
    return features_of(ops, weights, config, x, sums, patches, outputs, out_dtype)


def run_blocks(
    ops: Ops, weights: EncoderWeights, config: ModelConfig, x: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """All blocks but the last, which is another for each set of outputs: x (B, S, D) and the sums
    of squares of its rows -> the same."""
    heads = config.backbone.num_attention_heads
    for block in weights.blocks:
        if isinstance(block, Fp8Block):
            # Such weights are packed for a namespace alone that computes in FP8: `resolve_backend`.
            x, sums = run_fp8_block(cast(Fp8Ops, ops), block, x, heads)
        else:
            x, sums = run_block(ops, block, x, sums, heads)
    return x, sums


def features_of(
    ops: Ops,
    weights: EncoderWeights,
    config: ModelConfig,
    x: Tensor,
    sums: Tensor | None,
    patches: int,
    outputs: Collection[str],
    out_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """`encode` from what `run_blocks` gives on."""
    heads, tokens = config.backbone.num_attention_heads, config.num_sparse_tokens
    rows = wanted_rows(outputs, patches, tokens)
    x = run_last_block(ops, weights.last, x, sums, rows.values(), heads)

    lengths = [part.stop - part.start for part in rows.values()]
    norm = weights.norm
    parts = ops.norm(x, norm.weight, norm.bias, LAYER_NORM_EPS, lengths, out_dtype)
    features: dict[str, Any] = dict(zip(rows, parts, strict=True))
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
    features |= derived(features, outputs)
    return {name: features[name] for name in (*OUTPUTS, *DERIVED) if name in outputs}
