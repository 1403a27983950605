"""Softmax attention without a mask: out = softmax(q kᵀ / sqrt(d)) v for every head of packed qkv.

query (B, Q, D), key_value (B, S, 2 D), out (B, Q, D), heads side by side in D. One program takes
some query rows of one head; keys and values stream through in blocks, the next ones on their way
while one is worked on. A head_dim that is no power of two is two pieces, 80 as 64 + 16.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpus import Gpu
from .launch import (
    FP8,
    FP8_MAX,
    NAMES,
    Layout,
    Plan,
    Target,
    aligned,
    describable,
    launch,
    planned,
    table_of,
    target_of,
)
from .pieces import to_fp8, wait_for_inputs
from .tables import AttentionTile


@triton.jit
def _rows(ptr, first, limit, stride, width: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """(BLOCK, D) rows from `first`; zeros from `limit` on and beside `width` columns."""
    rows = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    mask = (rows < limit)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask, other=0.0)


@triton.jit
def _key_value_block(
    key_value_a,
    key_value_b,
    image,
    first,
    column,
    offset,
    S,
    stride,
    DESCRIPTORS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows first... of keys (or values) of one head, in its two pieces."""
    if DESCRIPTORS:
        a = key_value_a.load([image, first, column]).reshape(BLOCK, DIM_A)
    else:
        a = _rows(key_value_a + offset, first, S, stride, HEAD_DIM, BLOCK, DIM_A)
    if DIM_B == 0:
        b = a
    elif DESCRIPTORS:
        b = key_value_b.load([image, first, column + DIM_A]).reshape(BLOCK, DIM_B)
    else:
        b = _rows(key_value_a + offset + DIM_A, first, S, stride, HEAD_DIM - DIM_A, BLOCK, DIM_B)
    return a, b


@triton.jit
def _attend(
    q_a, q_b, k_a, k_b, v_a, v_b, peak, total, acc_a, acc_b, left, scale,
    DIM_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax; `left` of its rows are there."""
    scores = tl.dot(q_a, k_a.T, input_precision="ieee")
    if DIM_B > 0:
        scores = tl.dot(q_b, k_b.T, scores, input_precision="ieee")
    scores = tl.where((tl.arange(0, BLOCK) < left)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # Scaled where the peak is taken off, which is one instruction, and not before.
    p = tl.exp2(scores * scale - (new_peak * scale)[:, None])
    shrink = tl.exp2((peak - new_peak) * scale)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v_a.dtype)
    acc_a = tl.dot(p, v_a, acc_a * shrink[:, None], input_precision="ieee")
    if DIM_B > 0:
        acc_b = tl.dot(p, v_b, acc_b * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc_a, acc_b


@triton.jit
def _store(
    out_ptr, acc, rows, Q, width, out_factor, D: tl.constexpr, DIM: tl.constexpr,
    QUANTIZE: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, DIM)
    mask = (rows < Q)[:, None] & (columns < D)[None, :]
    if QUANTIZE:
        y = to_fp8(acc * out_factor, FP8_MAX)
    else:
        y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], y, mask=mask)


@triton.jit
def _attention_kernel(
    query_ptr,  # (B, Q, heads * HEAD_DIM)
    key_value_a,  # (B, S, 2 * heads * HEAD_DIM): pointer, or descriptor of (1, BLOCK_K, DIM_A)
    key_value_b,  # the same of (1, BLOCK_K, DIM_B)
    out_ptr,  # (B, Q, heads * HEAD_DIM)
    Q,
    S,
    heads,
    scale,  # log2(e) / sqrt(HEAD_DIM)
    out_factor,  # 1 / scale of a quantized output
    stride_qb,
    stride_qs,
    stride_kb,
    stride_ks,
    QUANTIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8_MAX: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    image = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    width = heads * HEAD_DIM
    query_ptr += image.to(tl.int64) * stride_qb + head * HEAD_DIM
    out_ptr += image.to(tl.int64) * Q * width + head * HEAD_DIM
    key = head * HEAD_DIM
    value = width + key
    key_offset = image.to(tl.int64) * stride_kb + key
    value_offset = key_offset + width

    first = tl.program_id(1) * BLOCK_Q
    q_a = _rows(query_ptr, first, Q, stride_qs, HEAD_DIM, BLOCK_Q, DIM_A)
    q_b = q_a
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc_a = tl.zeros((BLOCK_Q, DIM_A), tl.float32)
    acc_b = acc_a
    if DIM_B > 0:
        q_b = _rows(query_ptr + DIM_A, first, Q, stride_qs, HEAD_DIM - DIM_A, BLOCK_Q, DIM_B)
        acc_b = tl.zeros((BLOCK_Q, DIM_B), tl.float32)
    for start in range(0, S, BLOCK_K):
        k_a, k_b = _key_value_block(
            key_value_a, key_value_b, image, start, key, key_offset, S, stride_ks,
            DESCRIPTORS, HEAD_DIM, DIM_A, DIM_B, BLOCK_K,
        )  # fmt: skip
        v_a, v_b = _key_value_block(
            key_value_a, key_value_b, image, start, value, value_offset, S, stride_ks,
            DESCRIPTORS, HEAD_DIM, DIM_A, DIM_B, BLOCK_K,
        )  # fmt: skip
        peak, total, acc_a, acc_b = _attend(
            q_a, q_b, k_a, k_b, v_a, v_b, peak, total, acc_a, acc_b, S - start, scale,
            DIM_B, BLOCK_K,
        )  # fmt: skip

    rows = first + tl.arange(0, BLOCK_Q)
    _store(
        out_ptr, acc_a / total[:, None], rows, Q, width, out_factor, HEAD_DIM, DIM_A,
        QUANTIZE, FP8_MAX,
    )  # fmt: skip
    if DIM_B > 0:
        _store(
            out_ptr + DIM_A, acc_b / total[:, None], rows, Q, width, out_factor,
            HEAD_DIM - DIM_A, DIM_B, QUANTIZE, FP8_MAX,
        )  # fmt: skip


def attention_tile(
    gpu: Gpu, dtype: torch.dtype, batch: int, heads: int, length: int, head_dim: int
) -> AttentionTile:
    """The tile of attention over `length` keys: tuned, or by heuristics.

    Whatever the batch, blocks have the same keys: the running softmax adds them up alike.
    """
    tuned = table_of(gpu).attention_tile(NAMES.get(dtype, ""), batch * length, length, head_dim)
    if tuned is not None:
        return tuned
    if dtype == torch.float32:
        # Left to itself, the assembler gives so few registers that it spills.
        return AttentionTile(32, 32, num_warps=4, num_stages=1, registers=128)
    if gpu.shared < 200_000:
        return AttentionTile(64, 64, num_warps=4, num_stages=2)
    # The more query rows a program has, the fewer programs read the same keys.
    programs = batch * heads * -(-length // 128)
    rows = 128 if head_dim <= 64 and programs >= 4 * gpu.processors else 64
    return AttentionTile(rows, 64, num_warps=4, num_stages=3)


def _pieces(head_dim: int) -> tuple[int, int]:
    """A head_dim as two powers of two, at least 16 each, that hold it; the second may be 0."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    left = head_dim - first
    return first, max(16, triton.next_power_of_2(left)) if left > 0 else 0


@planned
def _plan(
    target: Target,
    query_shape: torch.Size,
    query_strides: tuple[int, ...],
    key_value_shape: torch.Size,
    key_value_strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],  # of query and key_value
    on_grid: bool,  # key_value `aligned`
    num_heads: int,
    out_scale: float | None,
) -> Plan:
    batch, queries, width = query_shape
    if len(key_value_shape) != 3 or key_value_shape[::2] != (batch, 2 * width):
        raise ValueError(
            f"key_value must be ({batch}, S, {2 * width}) for query {tuple(query_shape)}, got "
            f"{tuple(key_value_shape)}"
        )
    if width % num_heads or width // num_heads > 128:
        raise ValueError(
            f"head_dim must be an integer up to 128, got {width} channels in {num_heads} heads"
        )
    head_dim, length = width // num_heads, key_value_shape[1]
    if length == 0:
        raise ValueError("key_value has no rows to attend to")
    dim_a, dim_b = _pieces(head_dim)
    # Exact float32 products take their operands from registers: TMA's way there spills.
    descriptors = (
        target.gpu.descriptors
        and dtypes[0] != torch.float32
        and batch > 0
        and dim_a + dim_b == head_dim
        and on_grid
        and describable(key_value_strides, dtypes[1])
    )
    tile = attention_tile(target.gpu, dtypes[0], batch, num_heads, length, head_dim)
    layouts = {}
    if descriptors:
        for name, dim in (("key_value_a", dim_a), ("key_value_b", dim_b)):
            if dim:
                block = [1, tile.block_k, dim]
                layouts[name] = Layout([*key_value_shape], [*key_value_strides], block)
    return Plan(
        target,
        _attention_kernel,
        (batch * num_heads, -(-queries // tile.block_q)),
        tile.options,
        {
            "Q": queries,
            "S": length,
            "heads": num_heads,
            "scale": math.log2(math.e) / math.sqrt(head_dim),
            "out_factor": 1.0 if out_scale is None else 1.0 / out_scale,
            "stride_qb": query_strides[0],
            "stride_qs": query_strides[1],
            "stride_kb": key_value_strides[0],
            "stride_ks": key_value_strides[1],
            "QUANTIZE": out_scale is not None,
            "DESCRIPTORS": descriptors,
            "HEAD_DIM": head_dim,
            "DIM_A": dim_a,
            "DIM_B": dim_b,
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "FP8_MAX": FP8_MAX,
        },
        layouts,
    )


def attention(
    query: Tensor, key_value: Tensor, num_heads: int, *, out_scale: float | None = None
) -> Tensor:
    """`reference.ops.attention`, for a head_dim up to 128.

    Raises:
        ValueError: shapes do not fit, or head_dim is larger.
    """
    query, key_value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key_value))
    device = query.device
    plan = _plan(
        target_of(device),
        query.shape,
        query.stride(),
        key_value.shape,
        key_value.stride(),
        (query.dtype, key_value.dtype),
        aligned(key_value),
        num_heads,
        out_scale,
    )
    dtype = query.dtype if out_scale is None else FP8
    out = torch.empty(query.shape, dtype=dtype, device=device)
    launch(
        plan,
        device,
        query_ptr=query,
        key_value_a=key_value,
        key_value_b=key_value if "key_value_b" in plan.layouts else None,
        out_ptr=out,
    )
    return out
