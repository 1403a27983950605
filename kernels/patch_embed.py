"""Pixels to the sequence that enters the first block: x = patches @ weightᵀ + table.

images (B, 3, H, W), weight (D, 3 p²), x (B, S, D) with S = 1 + P + K. Two launches: the first lays
the pixels of each patch side by side, from the image as it lies in memory, uint8 or float; gathered
inside the product, every tile of columns would do that again. Tiles of the product run over rows of
the whole sequence: those of CLS and of the sparse tokens take no pixels, only what is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SUM_BLOCK, Plan, Target, launch, planned, target_of
from .pieces import slices, square_sums, wait_for_inputs
from .tables import Tile

UNFOLDED = 256  # columns of pixels that one program copies


@triton.jit
def _unfold_kernel(
    images_ptr,  # (B, 3, H, W)
    tiles_ptr,  # (B, P, PADDED)
    centre,
    grid_rows,
    grid_columns,  # patches side by side
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    PATCH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,  # PATCH, padded
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some columns of one channel of a row of patches."""
    wait_for_inputs(EARLY)
    channel = tl.program_id(0) % 3
    grid_row = tl.program_id(0) // 3 % grid_rows
    image = (tl.program_id(0) // (3 * grid_rows)).to(tl.int64)
    y = tl.arange(0, LINES)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (y < PATCH)[:, None] & (x < grid_columns * PATCH)[None, :]
    images_ptr += image * stride_b + channel.to(tl.int64) * stride_c
    lines = (grid_row * PATCH + y).to(tl.int64) * stride_h
    pixels = tl.load(
        images_ptr + lines[:, None] + x.to(tl.int64)[None, :] * stride_w, mask=mask, other=0
    )
    if pixels.dtype != tl.float64:
        pixels = pixels.to(tl.float32)
    patch = (image * grid_rows + grid_row) * grid_columns + x // PATCH
    within = (channel * PATCH + y)[:, None] * PATCH + (x % PATCH)[None, :]
    tl.store(
        tiles_ptr + patch[None, :] * PADDED + within,
        (pixels - centre).to(tiles_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _finish(
    acc,  # (BLOCK_M, WIDTH) float32: columns first_column... of the tile
    first_row,
    first_column,
    table_ptr,
    sparse_ptr,
    out_ptr,
    sums_ptr,
    rows_out,
    S,
    P,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, WIDTH)
    position = (rows % S).to(tl.int64)[:, None]
    mask_m = (rows < rows_out)[:, None]
    mask_n = (columns < D)[None, :]
    in_table = position <= P
    table = tl.load(table_ptr + position * D + columns[None, :], mask=mask_n & in_table, other=0.0)
    token = tl.load(
        sparse_ptr + (position - 1 - P) * D + columns[None, :], mask=mask_n & (position > P),
        other=0.0,
    )  # fmt: skip
    y = acc + tl.where(in_table, table.to(tl.float32), token.to(tl.float32))
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], y, mask=mask_m & mask_n)
    # Of what was stored: the next launch reads the rounded numbers. Beyond D they are zeros.
    sums = square_sums(y.to(tl.float32), BLOCK_M, WIDTH, SUM_BLOCK)
    parts = first_column // SUM_BLOCK + tl.arange(0, WIDTH // SUM_BLOCK)
    at = parts.to(tl.int64)[None, :] * rows_out + rows[:, None]
    tl.store(sums_ptr + at, sums, mask=mask_m & (parts * SUM_BLOCK < D)[None, :])


@triton.jit(do_not_specialize=["rows_out"])
def _patch_embed_kernel(
    tiles_ptr,  # (B, P, PADDED)
    weight_ptr,  # (D, DEPTH)
    table_ptr,  # (1 + P, D)
    sparse_ptr,  # (K, D)
    out_ptr,  # (B, S, D)
    sums_ptr,  # (ceil(D / SUM_BLOCK), B, S) float32
    rows_out,  # B * S
    S,
    P,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    # The column tiles of some rows run side by side: they read the same pixels.
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // tiles_n * BLOCK_M
    first_column = tl.program_id(0) % tiles_n * BLOCK_N

    rows = first_row + tl.arange(0, BLOCK_M)
    patch = rows % S - 1
    is_patch = (rows < rows_out) & (patch >= 0) & (patch < P)
    tile = (rows // S).to(tl.int64) * P + patch
    columns = first_column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        mask_k = (ks < DEPTH)[None, :]
        pixels = tl.load(
            tiles_ptr + tile[:, None] * PADDED + ks[None, :],
            mask=is_patch[:, None] & mask_k,
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + columns.to(tl.int64)[:, None] * DEPTH + ks[None, :],
            mask=(columns < D)[:, None] & mask_k,
            other=0.0,
        )
        acc = tl.dot(pixels, weight.T, acc, input_precision="ieee")

    WIDTH: tl.constexpr = BLOCK_N // SLICES
    columns_of = slices(acc, BLOCK_M, BLOCK_N, SLICES)
    for slice in tl.static_range(SLICES):
        _finish(
            columns_of[slice],
            first_row,
            first_column + slice * WIDTH,
            table_ptr=table_ptr,
            sparse_ptr=sparse_ptr,
            out_ptr=out_ptr,
            sums_ptr=sums_ptr,
            rows_out=rows_out,
            S=S,
            P=P,
            D=D,
            BLOCK_M=BLOCK_M,
            WIDTH=WIDTH,
            SUM_BLOCK=SUM_BLOCK,
        )


def patch_embed_tile(weight: torch.dtype) -> Tile:
    """The tile of patch_embed, the same on every GPU and for every batch."""
    if weight == torch.float32:
        return Tile(64, 64, 16, num_warps=8, num_stages=2)
    return Tile(128, 128, 64, num_warps=8, num_stages=3, slices=2)


def patch_embed_options(tile: Tile, weight: torch.dtype) -> dict[str, int]:
    """Options of the compiler for patch_embed; see `linear_options` for the registers."""
    registers = 128 if weight == torch.float32 else 255
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": registers}


@planned
def _plans(
    target: Target,
    images: torch.Size,
    strides: tuple[int, ...],
    weight: torch.Size,
    dtype: torch.dtype,  # of weight
    table: torch.Size,
    sparse_tokens: torch.Size,
    patch_size: int,
    centre: float,
) -> tuple[Plan, Plan]:
    """Of the two launches."""
    if len(images) != 4 or images[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images)}")
    batch, _, height, width = images
    grid_rows, grid_columns = height // patch_size, width // patch_size
    patches = grid_rows * grid_columns
    if patches == 0:
        raise ValueError(
            f"images must be at least {patch_size} pixels high and wide, got {tuple(images)}"
        )
    depth = 3 * patch_size**2
    if len(weight) != 2 or weight[1] != depth:
        raise ValueError(
            f"weight must be (D, {depth}) for patches of {patch_size}, got {tuple(weight)}"
        )
    columns = weight[0]
    if table != (1 + patches, columns):
        raise ValueError(
            f"table must be {(1 + patches, columns)} for images {tuple(images)}, got {tuple(table)}"
        )
    if len(sparse_tokens) != 2 or sparse_tokens[1] != columns:
        raise ValueError(f"sparse_tokens must be (K, {columns}), got {tuple(sparse_tokens)}")
    length = 1 + patches + sparse_tokens[0]
    padded = triton.cdiv(depth, 16) * 16  # rows at multiples of 16 bytes, which are read at once
    unfold = Plan(
        target,
        _unfold_kernel,
        (batch * grid_rows * 3, triton.cdiv(grid_columns * patch_size, UNFOLDED)),
        {"num_warps": 4, "num_stages": 1},
        {
            "centre": float(centre),
            "grid_rows": grid_rows,
            "grid_columns": grid_columns,
            "stride_b": strides[0],
            "stride_c": strides[1],
            "stride_h": strides[2],
            "stride_w": strides[3],
            "PATCH": patch_size,
            "PADDED": padded,
            "LINES": triton.next_power_of_2(patch_size),
            "BLOCK": UNFOLDED,
        },
    )
    tile = patch_embed_tile(dtype)
    tiles = triton.cdiv(batch * length, tile.block_m) * triton.cdiv(columns, tile.block_n)
    embed = Plan(
        target,
        _patch_embed_kernel,
        (tiles,),
        patch_embed_options(tile, dtype),
        {
            "rows_out": batch * length,
            "S": length,
            "P": patches,
            "D": columns,
            "DEPTH": depth,
            "PADDED": padded,
            "SLICES": tile.slices,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "SUM_BLOCK": SUM_BLOCK,
        },
    )
    return unfold, embed


def patch_embed(
    images: Tensor,
    weight: Tensor,
    table: Tensor,
    sparse_tokens: Tensor,
    patch_size: int,
    centre: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`reference.ops.patch_embed`; one partial sum of squares for every 64 columns.

    Raises:
        ValueError: shapes do not fit.
    """
    dtype, device = weight.dtype, images.device
    unfold, embed = _plans(
        target_of(device),
        images.shape,
        images.stride(),
        weight.shape,
        dtype,
        table.shape,
        sparse_tokens.shape,
        patch_size,
        centre,
    )
    batch, (columns, depth), patches = images.shape[0], weight.shape, table.shape[0] - 1
    length = 1 + patches + sparse_tokens.shape[0]
    out = torch.empty((batch, length, columns), dtype=dtype, device=device)
    parts = -(-columns // SUM_BLOCK)
    sums = torch.empty((parts, batch, length), dtype=torch.float32, device=device)
    unfolded = torch.empty((batch, patches, -(-depth // 16) * 16), dtype=dtype, device=device)
    launch(unfold, device, images_ptr=images, tiles_ptr=unfolded)
    launch(
        embed,
        device,
        tiles_ptr=unfolded,
        weight_ptr=weight.contiguous(),
        table_ptr=table.contiguous(),
        sparse_ptr=sparse_tokens.contiguous(),
        out_ptr=out,
        sums_ptr=sums,
    )
    return out, sums
