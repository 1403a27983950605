"""What several kernels are made of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_erf(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def to_fp8(x, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT).to(tl.float8e4nv)


@triton.jit
def square_sums(y, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, SUM_BLOCK: tl.constexpr):
    """Σy² of each SUM_BLOCK columns: (BLOCK_M, WIDTH) -> (BLOCK_M, WIDTH // SUM_BLOCK)."""
    return tl.sum(tl.reshape(y * y, (BLOCK_M, WIDTH // SUM_BLOCK, SUM_BLOCK)), axis=2)


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def row_sums(sums_ptr, rows, M, parts, BLOCK_M: tl.constexpr):
    """Sum over `parts` of (parts, M) float32, in order: (BLOCK_M,)."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for _ in range(parts):
        total += tl.load(sums_ptr + rows, mask=rows < M, other=0.0)
        sums_ptr += M
    return total
