"""spatial = softmax(cos(d, s) / temperature) over the K tokens of an image, and spatial @ sparse.

dense (B, P, D), sparse (B, K, D), d and s their projections. Two launches after the small product
that makes s. The first multiplies tiles of dense with dense_weight and takes from each tile of d,
while it is in registers, its share of d · s and |d|²: d never reaches memory. The second adds the
shares up, takes the softmax, and mixes the tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import NORMALIZE_EPS
from .launch import Plan, Target, launch, planned, target_of
from .linear import linear
from .pieces import wait_for_inputs
from .reassemble import MAX_TOKENS, reassemble_tile, store_mixture
from .tables import Tile

Projections = tuple[
    tuple[torch.Size, torch.dtype], ...
]  # weights and biases, dense's then sparse's


@triton.jit(do_not_specialize=["B"])
def _similarity_kernel(
    dense_ptr,  # (B, P, D), of the weight's dtype: converted here, it would hold the products up
    weight_ptr,  # (D, D)
    bias_ptr,  # (D,)
    s_ptr,  # (B, K, D)
    shares_ptr,  # (tiles_n, B, P, K + 1) float32: d · s of K tokens, |d|²
    s_squares_ptr,  # (tiles_n, B, K) float32: |s|²
    B,
    P,
    steps,  # of BLOCK_K in D: not constexpr, so that the compiler does not unroll them all
    stride_db,
    stride_dp,
    K: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,  # K, padded
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    # The column tiles of some patches run side by side: they read the same rows of dense.
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(P, BLOCK_M)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    image = (tl.program_id(0) // (tiles_n * tiles_m)).to(tl.int64)

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rows < P
    mask_n = columns < D
    dense_ptr += image * stride_db
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = (ks < D)[None, :]
        dense = tl.load(
            dense_ptr + rows.to(tl.int64)[:, None] * stride_dp + ks[None, :],
            mask=mask_m[:, None] & mask_k,
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + columns.to(tl.int64)[:, None] * D + ks[None, :],
            mask=mask_n[:, None] & mask_k,
            other=0.0,
        )
        acc = tl.dot(dense, weight.T, acc, input_precision="ieee")
    bias = tl.load(bias_ptr + columns, mask=mask_n, other=0.0).to(tl.float32)
    d = (acc + bias[None, :]).to(weight_ptr.dtype.element_ty)

    tokens = tl.arange(0, TOKENS)
    mask_t = tokens < K
    s = tl.load(
        s_ptr + (image * K + tokens)[:, None] * D + columns[None, :],
        mask=mask_t[:, None] & mask_n[None, :],
        other=0.0,
    )
    products = tl.dot(d, s.T, input_precision="ieee")
    squares = tl.sum(d.to(tl.float32) * d.to(tl.float32), 1)
    share = tile_n.to(tl.int64) * B + image
    shares_ptr += (share * P + rows) * (K + 1)
    tl.store(
        shares_ptr[:, None] + tokens[None, :], products, mask=mask_m[:, None] & mask_t[None, :]
    )
    tl.store(shares_ptr + K, squares, mask=mask_m)
    if tile_m == 0:
        s_squares = tl.sum(s.to(tl.float32) * s.to(tl.float32), 1)
        s_squares_ptr += share * K
        tl.store(s_squares_ptr + tokens, s_squares, mask=mask_t)


@triton.jit(do_not_specialize=["B"])
def _spatial_kernel(
    shares_ptr,  # (parts, B, P, K + 1) float32
    s_squares_ptr,  # (parts, B, K) float32
    sparse_ptr,  # (B, K, D)
    spatial_ptr,  # (B, P, K)
    lowrank_ptr,  # (B, P, D)
    B,
    P,
    divisor,
    stride_sb,
    stride_sk,
    parts: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    LOWRANK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    tiles_p = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // tiles_p).to(tl.int64)
    rows = tl.program_id(0) % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    tokens = tl.arange(0, BLOCK_K)
    mask_p = rows < P
    mask_k = tokens < K
    mask = mask_p[:, None] & mask_k[None, :]
    logits = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    d_squares = tl.zeros((BLOCK_P,), tl.float32)
    s_squares = tl.zeros((BLOCK_K,), tl.float32)
    images = B.to(tl.int64)
    for part in tl.range(parts, loop_unroll_factor=4):
        share = shares_ptr + ((part * images + image) * P + rows) * (K + 1)
        logits += tl.load(share[:, None] + tokens[None, :], mask=mask, other=0.0)
        if NORMALIZE:
            s_share = s_squares_ptr + (part * images + image) * K
            d_squares += tl.load(share + K, mask=mask_p, other=0.0)
            s_squares += tl.load(s_share + tokens, mask=mask_k, other=0.0)
    if NORMALIZE:
        d_norm = tl.maximum(tl.sqrt(d_squares), EPS)
        s_norm = tl.maximum(tl.sqrt(s_squares), EPS)
        logits = logits / d_norm[:, None] / s_norm[None, :]
    logits = tl.where(mask_k[None, :], logits / divisor, float("-inf"))

    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    spatial = (e / tl.sum(e, 1)[:, None]).to(spatial_ptr.dtype.element_ty)
    if tl.program_id(1) == 0:
        row_ptr = spatial_ptr + (image * P + rows) * K
        tl.store(row_ptr[:, None] + tokens[None, :], spatial, mask=mask)
    if LOWRANK:
        store_mixture(
            spatial, sparse_ptr, lowrank_ptr, image, rows, tl.program_id(1) * BLOCK_D, P,
            stride_sb, stride_sk, K, D, BLOCK_P, BLOCK_K, BLOCK_D,
        )  # fmt: skip


def spatial_map_options(tile: Tile, weight: torch.dtype) -> dict[str, int]:
    """Options of the compiler for spatial_map's product; see `linear_options`."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {**options, "maxnreg": 128} if weight == torch.float32 else options


def spatial_map_tile(weight: torch.dtype) -> Tile:
    """The tile of spatial_map's product, the same on every GPU and for every batch."""
    if weight == torch.float32:
        return Tile(64, 32, 16, num_warps=8, num_stages=2)
    return Tile(64, 128, 64, num_warps=4, num_stages=4)


def _check(dense: torch.Size, sparse: torch.Size, layers: Projections) -> None:
    if len(dense) != 3:
        raise ValueError(f"dense must be (B, P, D), got {tuple(dense)}")
    batch, _, width = dense
    if len(sparse) != 3 or sparse[::2] != (batch, width):
        raise ValueError(
            f"sparse must be ({batch}, K, {width}) for dense {tuple(dense)}, got {tuple(sparse)}"
        )
    if not 1 <= sparse[1] <= MAX_TOKENS:
        raise ValueError(f"sparse must have 1 to {MAX_TOKENS} tokens, got {sparse[1]}")
    names = ("dense_weight", "dense_bias", "sparse_weight", "sparse_bias")
    for name, (shape, _) in zip(names, layers, strict=True):
        wanted = (width, width) if name.endswith("weight") else (width,)
        if shape != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(shape)}")
    dtypes = {dtype for _, dtype in layers}
    if len(dtypes) > 1:
        raise ValueError(f"weights and biases must have one dtype, got {sorted(map(str, dtypes))}")


@planned
def _plans(
    target: Target,
    dense: torch.Size,
    dense_strides: tuple[int, ...],  # in the weights' dtype
    sparse: torch.Size,
    sparse_strides: tuple[int, ...],
    layers: Projections,
    temperature: float | None,
    lowrank: bool,
) -> tuple[Plan, Plan]:
    """Of the two launches."""
    _check(dense, sparse, layers)
    batch, patches, width = dense
    tokens, weight = sparse[1], layers[0][1]
    tile, mix = spatial_map_tile(weight), reassemble_tile(tokens)
    tiles_m, tiles_n = triton.cdiv(patches, tile.block_m), triton.cdiv(width, tile.block_n)
    similarity = Plan(
        target,
        _similarity_kernel,
        (batch * tiles_m * tiles_n,),
        spatial_map_options(tile, weight),
        {
            "B": batch,
            "P": patches,
            "steps": triton.cdiv(width, tile.block_k),
            "stride_db": dense_strides[0],
            "stride_dp": dense_strides[1],
            "K": tokens,
            "D": width,
            "TOKENS": mix.block_k,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
    )
    columns = triton.cdiv(width, mix.block_n) if lowrank else 1
    mixture = Plan(
        target,
        _spatial_kernel,
        (batch * triton.cdiv(patches, mix.block_m), columns),
        {"num_warps": mix.num_warps, "num_stages": mix.num_stages},
        {
            "B": batch,
            "P": patches,
            "divisor": math.sqrt(width) if temperature is None else float(temperature),
            "stride_sb": sparse_strides[0],
            "stride_sk": sparse_strides[1],
            "parts": tiles_n,
            "K": tokens,
            "D": width,
            "NORMALIZE": temperature is not None,
            "EPS": NORMALIZE_EPS,
            "LOWRANK": lowrank,
            "BLOCK_P": mix.block_m,
            "BLOCK_K": mix.block_k,
            "BLOCK_D": mix.block_n,
        },
    )
    return similarity, mixture


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
    """`reference.ops.spatial_map` for up to 64 tokens; norms and softmax are float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or there are more tokens.
    """
    dense, sparse = (x if x.stride(-1) == 1 else x.contiguous() for x in (dense, sparse))
    device = dense.device
    rounded = dense.to(dense_weight.dtype)
    projections = (dense_weight, dense_bias, sparse_weight, sparse_bias)
    similarity, mixture = _plans(
        target_of(device),
        dense.shape,
        rounded.stride(),
        sparse.shape,
        sparse.stride(),
        tuple([(x.shape, x.dtype) for x in projections]),
        temperature,
        lowrank,
    )
    batch, patches, width = dense.shape
    tokens = sparse.shape[1]
    s = linear(sparse.to(sparse_weight.dtype), sparse_weight, sparse_bias)
    tiles = -(-width // spatial_map_tile(dense_weight.dtype).block_n)
    shares = torch.empty((tiles, batch, patches, tokens + 1), dtype=torch.float32, device=device)
    s_squares = torch.empty((tiles, batch, tokens), dtype=torch.float32, device=device)
    launch(
        similarity,
        device,
        dense_ptr=rounded,
        weight_ptr=dense_weight.contiguous(),
        bias_ptr=dense_bias.contiguous(),
        s_ptr=s,
        shares_ptr=shares,
        s_squares_ptr=s_squares,
    )
    spatial = torch.empty((batch, patches, tokens), dtype=dense.dtype, device=device)
    mixed = None
    if lowrank:
        dtype = torch.promote_types(dense.dtype, sparse.dtype)
        mixed = torch.empty((batch, patches, width), dtype=dtype, device=device)
    launch(
        mixture,
        device,
        shares_ptr=shares,
        s_squares_ptr=s_squares,
        sparse_ptr=sparse if lowrank else None,
        spatial_ptr=spatial,
        lowrank_ptr=mixed,
    )
    return spatial, mixed
