"""The low-rank dense features out = spatial @ sparse: every patch a mixture of an image's tokens.

spatial (B, P, K), sparse (B, K, D), out (B, P, D), K small: what is written is nearly all there is
to do. `spatial_map` does the same with the rows of `spatial` that it has just made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, Target, launch, planned, target_of
from .pieces import wait_for_inputs
from .tables import Tile

MAX_TOKENS = 64  # of which one program keeps all


@triton.jit
def store_mixture(
    mixture,  # (BLOCK_P, BLOCK_K): rows of spatial, zeros beyond K
    sparse_ptr,  # (B, K, D)
    out_ptr,  # (B, P, D)
    image,  # int64
    rows,  # (BLOCK_P,)
    first_column,
    P,
    stride_sb,
    stride_sk,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes columns first_column... of `mixture` @ sparse."""
    tokens = tl.arange(0, BLOCK_K)
    columns = first_column + tl.arange(0, BLOCK_D)
    mask_d = (columns < D)[None, :]
    sparse = tl.load(
        sparse_ptr
        + image * stride_sb
        + tokens.to(tl.int64)[:, None] * stride_sk
        + columns[None, :],
        mask=(tokens < K)[:, None] & mask_d,
        other=0.0,
    )
    if mixture.dtype != sparse.dtype or mixture.dtype.primitive_bitwidth > 16:
        mixture = mixture.to(tl.float32)
        sparse = sparse.to(tl.float32)
    y = tl.dot(mixture, sparse, input_precision="ieee")
    tl.store(
        out_ptr + (image * P + rows)[:, None] * D + columns[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=(rows < P)[:, None] & mask_d,
    )


@triton.jit
def _reassemble_kernel(
    spatial_ptr,  # (B, P, K)
    sparse_ptr,  # (B, K, D)
    out_ptr,  # (B, P, D)
    P,
    stride_pb,
    stride_pp,
    stride_pk,
    stride_sb,
    stride_sk,
    K: tl.constexpr,
    D: tl.constexpr,
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
    mixture = tl.load(
        spatial_ptr
        + image * stride_pb
        + rows.to(tl.int64)[:, None] * stride_pp
        + tokens.to(tl.int64)[None, :] * stride_pk,
        mask=(rows < P)[:, None] & (tokens < K)[None, :],
        other=0.0,
    )
    store_mixture(
        mixture, sparse_ptr, out_ptr, image, rows, tl.program_id(1) * BLOCK_D, P, stride_sb,
        stride_sk, K, D, BLOCK_P, BLOCK_K, BLOCK_D,
    )  # fmt: skip


def reassemble_tile(tokens: int) -> Tile:
    """block_m patches x block_n columns of a mixture of tokens, block_k of them with padding.

    The more tokens, the fewer patches: all operands of an exact product are in the registers.
    """
    padded = max(16, 1 << (tokens - 1).bit_length())
    if padded > 32:
        return Tile(16, 32, padded, num_warps=4, num_stages=1)
    return Tile(32 if padded == 16 else 16, 128, padded, num_warps=4, num_stages=1)


@planned
def _plan(
    target: Target,
    spatial: torch.Size,
    spatial_strides: tuple[int, ...],
    sparse: torch.Size,
    sparse_strides: tuple[int, ...],
) -> Plan:
    if len(spatial) != 3:
        raise ValueError(f"spatial must be (B, P, K), got {tuple(spatial)}")
    batch, patches, tokens = spatial
    if len(sparse) != 3 or sparse[:2] != (batch, tokens):
        raise ValueError(
            f"sparse must be ({batch}, {tokens}, D) for spatial {tuple(spatial)}, got "
            f"{tuple(sparse)}"
        )
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"spatial must have 1 to {MAX_TOKENS} tokens, got {tokens}")
    width = sparse[2]
    tile = reassemble_tile(tokens)
    return Plan(
        target,
        _reassemble_kernel,
        (batch * triton.cdiv(patches, tile.block_m), triton.cdiv(width, tile.block_n)),
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        {
            "P": patches,
            "stride_pb": spatial_strides[0],
            "stride_pp": spatial_strides[1],
            "stride_pk": spatial_strides[2],
            "stride_sb": sparse_strides[0],
            "stride_sk": sparse_strides[1],
            "K": tokens,
            "D": width,
            "BLOCK_P": tile.block_m,
            "BLOCK_K": tile.block_k,
            "BLOCK_D": tile.block_n,
        },
    )


def reassemble(spatial: Tensor, sparse: Tensor) -> Tensor:
    """`reference.ops.reassemble` for up to 64 tokens, in the wider of the two dtypes.

    Products of float16 or bfloat16 are exact; sums, and the products of any other pair of dtypes,
    are float32.

    Raises:
        ValueError: shapes do not fit, or there are more tokens.
    """
    sparse = sparse if sparse.stride(-1) == 1 else sparse.contiguous()
    device = spatial.device
    strides = spatial.stride(), sparse.stride()
    plan = _plan(target_of(device), spatial.shape, strides[0], sparse.shape, strides[1])
    dtype = torch.promote_types(spatial.dtype, sparse.dtype)
    out = torch.empty((*spatial.shape[:2], sparse.shape[2]), dtype=dtype, device=device)
    launch(plan, device, spatial_ptr=spatial, sparse_ptr=sparse, out_ptr=out)
    return out
