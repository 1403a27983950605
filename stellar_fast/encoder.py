"""STELLAR's encoder over packed weights and an injected `ops` namespace."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from .config import LAYER_NORM_EPS, ModelConfig
from .weights import PIXEL_CENTRE, PIXEL_CENTRE_UINT8, Block, EncoderWeights, LastBlock

OUTPUTS = ("sparse", "spatial", "dense", "lowrank", "cls")


def wanted_rows(outputs: Collection[str], patches: int, tokens: int) -> dict[str, slice]:
    """What of the sequence [CLS | patches | sparse] `outputs` need of the last block, in order."""
    parts = {
        "cls": slice(0, 1),
        "dense": slice(1, 1 + patches),
        "sparse": slice(1 + patches, 1 + patches + tokens),
    }
    needed = set(outputs)
    if needed & {"spatial", "lowrank"}:
        needed |= {"dense", "sparse"}
    return {name: part for name, part in parts.items() if name in needed}


def run_block(ops, block: Block, x: Tensor, num_heads: int) -> Tensor:
    """One ViT block: (B, S, D) -> (B, S, D)."""
    width = x.shape[-1]
    qkv = ops.linear(x, block.qkv.weight, block.qkv.bias, norm_eps=LAYER_NORM_EPS)
    a = ops.attention(qkv[..., :width], qkv[..., width:], num_heads)
    x = ops.linear(a, block.proj.weight, block.proj.bias, residual=x)
    h = ops.linear(x, block.fc1.weight, block.fc1.bias, norm_eps=LAYER_NORM_EPS, gelu=True)
    return ops.linear(h, block.fc2.weight, block.fc2.bias, residual=x)


def run_last_block(
    ops, block: LastBlock, x: Tensor, rows: Iterable[slice], num_heads: int
) -> Tensor:
    """The last block on `rows` alone, attending to all: (B, S, D) -> (B, wanted rows, D)."""
    key_value = ops.linear(x, block.key_value.weight, block.key_value.bias, norm_eps=LAYER_NORM_EPS)
    x = torch.cat([x[:, part] for part in rows], dim=1)
    query = ops.linear(x, block.query.weight, block.query.bias, norm_eps=LAYER_NORM_EPS)
    a = ops.attention(query, key_value, num_heads)
    x = ops.linear(a, block.proj.weight, block.proj.bias, residual=x)
    h = ops.linear(x, block.fc1.weight, block.fc1.bias, norm_eps=LAYER_NORM_EPS, gelu=True)
    return ops.linear(h, block.fc2.weight, block.fc2.bias, residual=x)


def encode(
    ops,
    weights: EncoderWeights,
    config: ModelConfig,
    images: Tensor,
    table: Tensor,
    outputs: Collection[str],
) -> dict[str, Tensor]:
    """What of `OUTPUTS` is asked for, and no more.

    Args:
        images: (B, 3, H, W), uint8 or floats in [0, 1].
        table: (1 + P, D) float32, `weights.table.table(H // patch, W // patch)`.

    Returns:
        sparse (B, K, D), spatial (B, P, K), dense (B, P, D), lowrank (B, P, D), cls (B, 1, D); they
        may be views of one another's memory.
    """
    backbone = config.backbone
    patches, tokens = table.shape[0] - 1, config.num_sparse_tokens
    rows = wanted_rows(outputs, patches, tokens)
    if images.dtype == torch.uint8:
        patch, centre = weights.patch_uint8, PIXEL_CENTRE_UINT8
    else:
        patch, centre = weights.patch, PIXEL_CENTRE

    x = ops.patch_embed(images, patch, table, weights.sparse_tokens, backbone.patch_size, centre)
    for block in weights.blocks:
        x = run_block(ops, block, x, backbone.num_attention_heads)
    x = run_last_block(ops, weights.last, x, rows.values(), backbone.num_attention_heads)
    x = ops.norm(x, weights.norm.weight, weights.norm.bias, LAYER_NORM_EPS)

    lengths = [part.stop - part.start for part in rows.values()]
    features = dict(zip(rows, x.split(lengths, dim=1), strict=True))
    if "spatial" in outputs or "lowrank" in outputs:
        features["spatial"] = ops.spatial_map(
            features["dense"],
            features["sparse"],
            weights.dense_proj.weight,
            weights.dense_proj.bias,
            weights.sparse_proj.weight,
            weights.sparse_proj.bias,
            config.spatial_temp,
        )
    if "lowrank" in outputs:
        features["lowrank"] = ops.reassemble(features["spatial"], features["sparse"])
    return {name: features[name] for name in OUTPUTS if name in outputs}
