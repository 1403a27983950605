"""Pixels to the sequence that enters the first block: x = patches @ weightᵀ + table in one launch.

images (B, 3, H, W), weight (D, 3 p²), x (B, S, D) with S = 1 + P + K. The product gathers patches
from the image as it lies in memory, uint8 or float. Tiles run over rows of the whole sequence:
those of CLS and of the sparse tokens take no pixels, only what is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SUM_BLOCK, launch
from .pieces import slices, square_sums
from .tables import Tile


@triton.jit
def _pixels(
    image_ptr,  # (BLOCK_M,) pointers to the first pixel of each row's patch
    is_patch,  # (BLOCK_M,)
    first,
    centre,
    stride_c,
    stride_h,
    stride_w,
    PATCH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_K) pixels less `centre`, in float32; zeros where there are none."""
    ks = first + tl.arange(0, BLOCK_K)
    channel = (ks // (PATCH * PATCH)).to(tl.int64)
    y = (ks // PATCH % PATCH).to(tl.int64)
    x = (ks % PATCH).to(tl.int64)
    offsets = channel * stride_c + y * stride_h + x * stride_w
    mask = is_patch[:, None] & (ks < DEPTH)[None, :]
    pixels = tl.load(image_ptr[:, None] + offsets[None, :], mask=mask, other=0)
    if pixels.dtype != tl.float64:
        pixels = pixels.to(tl.float32)
    return tl.where(mask, pixels - centre, 0.0)


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
    images_ptr,  # (B, 3, H, W)
    weight_ptr,  # (D, DEPTH)
    table_ptr,  # (1 + P, D)
    sparse_ptr,  # (K, D)
    out_ptr,  # (B, S, D)
    sums_ptr,  # (ceil(D / SUM_BLOCK), B, S) float32
    centre,
    rows_out,  # B * S
    S,
    P,
    grid_columns,  # patches side by side
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    D: tl.constexpr,
    PATCH: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    # The column tiles of some rows run side by side: they read the same pixels.
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // tiles_n * BLOCK_M
    first_column = tl.program_id(0) % tiles_n * BLOCK_N

    rows = first_row + tl.arange(0, BLOCK_M)
    patch = rows % S - 1
    is_patch = (rows < rows_out) & (patch >= 0) & (patch < P)
    image_ptr = (
        images_ptr
        + (rows // S).to(tl.int64) * stride_b
        + (patch // grid_columns * PATCH).to(tl.int64) * stride_h
        + (patch % grid_columns * PATCH).to(tl.int64) * stride_w
    )
    columns = first_column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        pixels = _pixels(
            image_ptr, is_patch, first, centre, stride_c, stride_h, stride_w, PATCH, DEPTH,
            BLOCK_K,
        )  # fmt: skip
        ks = first + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_ptr + columns.to(tl.int64)[:, None] * DEPTH + ks[None, :],
            mask=(columns < D)[:, None] & (ks < DEPTH)[None, :],
            other=0.0,
        )
        acc = tl.dot(pixels.to(weight.dtype), weight.T, acc, input_precision="ieee")

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
    return Tile(128, 128, 32, num_warps=8, num_stages=3, slices=2)


def patch_embed_options(tile: Tile, weight: torch.dtype) -> dict[str, int]:
    """Options of the compiler for patch_embed; see `linear_options` for the registers."""
    registers = 128 if weight == torch.float32 else 255
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": registers}


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
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    batch, _, height, width = images.shape
    grid_rows, grid_columns = height // patch_size, width // patch_size
    patches = grid_rows * grid_columns
    if patches == 0:
        raise ValueError(
            f"images must be at least {patch_size} pixels high and wide, got {tuple(images.shape)}"
        )
    depth = 3 * patch_size**2
    if weight.dim() != 2 or weight.shape[1] != depth:
        raise ValueError(
            f"weight must be (D, {depth}) for patches of {patch_size}, got {tuple(weight.shape)}"
        )
    columns = weight.shape[0]
    if table.shape != (1 + patches, columns):
        raise ValueError(
            f"table must be {(1 + patches, columns)} for images {tuple(images.shape)}, got "
            f"{tuple(table.shape)}"
        )
    if sparse_tokens.dim() != 2 or sparse_tokens.shape[1] != columns:
        raise ValueError(f"sparse_tokens must be (K, {columns}), got {tuple(sparse_tokens.shape)}")
    length = 1 + patches + sparse_tokens.shape[0]
    out = torch.empty((batch, length, columns), dtype=weight.dtype, device=images.device)
    parts = triton.cdiv(columns, SUM_BLOCK)
    sums = torch.empty((parts, batch, length), dtype=torch.float32, device=images.device)
    tile = patch_embed_tile(weight.dtype)
    tiles = triton.cdiv(batch * length, tile.block_m) * triton.cdiv(columns, tile.block_n)
    launch(
        _patch_embed_kernel,
        (tiles,),
        device=images.device,
        options=patch_embed_options(tile, weight.dtype),
        images_ptr=images,
        weight_ptr=weight.contiguous(),
        table_ptr=table.contiguous(),
        sparse_ptr=sparse_tokens.contiguous(),
        out_ptr=out,
        sums_ptr=sums,
        centre=centre,
        rows_out=batch * length,
        S=length,
        P=patches,
        grid_columns=grid_columns,
        stride_b=images.stride(0),
        stride_c=images.stride(1),
        stride_h=images.stride(2),
        stride_w=images.stride(3),
        D=columns,
        PATCH=patch_size,
        DEPTH=depth,
        SLICES=tile.slices,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SUM_BLOCK=SUM_BLOCK,
    )
    return out, sums
