"""Rows of the residual stream divided by their RMS: out = x / sqrt(mean(x²) + eps) * weight + bias.

x (B, S, D). `norm` writes each part of the sequence to a block of its own, for the caller;
`quantize_rows` writes e4m3 rows with their scales, for an FP8 product. One program takes one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FP8, FP8_MAX, Plan, Target, launch, planned, target_of
from .pieces import to_fp8, wait_for_inputs

OPTIONS = {"num_warps": 4, "num_stages": 1}
PARTS = 3  # what a sequence is made of: CLS, patches, sparse tokens
SMALLEST = 2.0**-126  # smallest normal float32: its reciprocal is finite


@triton.jit
def _row(x_ptr, S, stride_xb, stride_xs, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's row of x (BLOCK_D,) in float32, zeros beyond D, and its mean square."""
    image = (tl.program_id(0) // S).to(tl.int64)
    position = (tl.program_id(0) % S).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    x_ptr += image * stride_xb + position * stride_xs
    x = tl.load(x_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    return x, tl.sum(x * x) / D


@triton.jit(do_not_specialize=["B"])
def _norm_kernel(
    x_ptr,  # (B, S, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (B, first, D), then (B, second - first, D), then (B, S - second, D)
    B,
    S,
    first,  # where the second part of the sequence starts
    second,  # where the third one starts
    eps,
    stride_xb,
    stride_xs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    x, mean = _row(x_ptr, S, stride_xb, stride_xs, D, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(mean + eps) * weight + bias

    image = (tl.program_id(0) // S).to(tl.int64)
    position = tl.program_id(0) % S
    start = tl.where(position < first, 0, tl.where(position < second, first, second))
    end = tl.where(position < first, first, tl.where(position < second, second, S))
    row = start.to(tl.int64) * B + image * (end - start) + (position - start)
    tl.store(out_ptr + row * D + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # (B, S, D)
    out_ptr,  # (B, S, D)
    scale_ptr,  # (B, S)
    S,
    eps,
    stride_xb,
    stride_xs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP8_MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    x, mean = _row(x_ptr, S, stride_xb, stride_xs, D, BLOCK_D)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    step = tl.maximum(tl.max(tl.abs(x)) / FP8_MAX, SMALLEST)  # a row of zeros has one too
    y = to_fp8(x * (1.0 / step), FP8_MAX)
    tl.store(out_ptr + row * D + columns, y, mask=columns < D)
    tl.store(scale_ptr + row, step * tl.rsqrt(mean + eps))


@planned
def _norm_plan(
    target: Target,
    shape: torch.Size,
    strides: tuple[int, ...],
    vectors: tuple[torch.Size, torch.Size],  # weight's and bias's
    eps: float,
    lengths: tuple[int, ...],
) -> Plan:
    batch, length, width = shape
    for name, vector in zip(("weight", "bias"), vectors, strict=True):
        if vector != (width,):
            raise ValueError(f"{name} must be ({width},), got {tuple(vector)}")
    if sum(lengths) != length or not 1 <= len(lengths) <= PARTS or min(lengths) < 0:
        raise ValueError(
            f"lengths must be 1 to {PARTS} numbers that sum to S = {length}, got {list(lengths)}"
        )
    return Plan(
        target,
        _norm_kernel,
        (batch * length,),
        OPTIONS,
        {
            "B": batch,
            "S": length,
            "first": lengths[0],
            "second": sum(lengths[:2]),
            "eps": float(eps),
            "stride_xb": strides[0],
            "stride_xs": strides[1],
            "D": width,
            "BLOCK_D": triton.next_power_of_2(width),
        },
    )


@planned
def _quantize_rows_plan(
    target: Target, shape: torch.Size, strides: tuple[int, ...], eps: float
) -> Plan:
    batch, length, width = shape
    return Plan(
        target,
        _quantize_rows_kernel,
        (batch * length,),
        OPTIONS,
        {
            "S": length,
            "eps": float(eps),
            "stride_xb": strides[0],
            "stride_xs": strides[1],
            "D": width,
            "BLOCK_D": triton.next_power_of_2(width),
            "FP8_MAX": FP8_MAX,
            "SMALLEST": SMALLEST,
        },
    )


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"x must be (B, S, D), got {tuple(x.shape)}")
    return x if x.stride(2) == 1 else x.contiguous()


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lengths: Sequence[int],
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """`reference.ops.norm`, for up to three parts; each is contiguous, all share one buffer.

    Raises:
        ValueError: shapes do not fit, or lengths are no cut of the sequence into 1 to 3 parts.
    """
    x, device = _rows(x), x.device
    vectors = weight.shape, bias.shape
    plan = _norm_plan(target_of(device), x.shape, x.stride(), vectors, eps, tuple(lengths))
    batch, length, width = x.shape
    out = torch.empty(batch * length * width, dtype=out_dtype, device=device)
    launch(
        plan,
        device,
        x_ptr=x,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        out_ptr=out,
    )
    shapes = [(batch, part, width) for part in lengths]
    blocks = out.split([math.prod(shape) for shape in shapes])
    return tuple(block.view(shape) for block, shape in zip(blocks, shapes, strict=True))


def quantize_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.ops.quantize_rows`.

    Raises:
        ValueError: x is not (B, S, D).
    """
    x, device = _rows(x), x.device
    plan = _quantize_rows_plan(target_of(device), x.shape, x.stride(), eps)
    out = torch.empty(x.shape, dtype=FP8, device=device)
    scale = torch.empty(x.shape[:2], dtype=torch.float32, device=device)
    launch(plan, device, x_ptr=x, out_ptr=out, scale_ptr=scale)
    return out, scale
