"""What several kernels are made of."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """First in every kernel: no memory is touched before the launch before it has ended.

    EARLY: the launch starts before that, so that its own start costs no time, and lets the next one
    start early too (programmatic dependent launch, sm_90 on).
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x Φ(x), Φ the normal distribution: by erf if EXACT, or else within 5e-5 of it.

    erf takes more instructions than all else behind a product. Φ(x) - 1/2 as an odd polynomial in x
    that is a minimax fit of x Φ(x), and passes 1/2 for good where it stops fitting, past |x| = 4.6:
    clamping makes it right again, and is free on the last multiply-add.
    """
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        u = x * x
        p = u * 3.59244173e-11 - 3.77270084e-09
        p = p * u + 1.74710639e-07
        p = p * u - 4.73610540e-06
        p = p * u + 8.44093838e-05
        p = p * u - 1.05569012e-03
        p = p * u + 9.64532399e-03
        p = p * u - 6.60800537e-02
        p = p * u + 3.98763546e-01
        cdf = tl.clamp(p * x + 0.5, 0.0, 1.0)
    return x * cdf


@triton.jit
def to_fp8(x, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT).to(tl.float8e4nv)


@triton.jit
def square_sums(y, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, SUM_BLOCK: tl.constexpr):
    """Σy² of each SUM_BLOCK columns: (BLOCK_M, WIDTH) -> (BLOCK_M, WIDTH // SUM_BLOCK)."""
    return tl.sum(tl.reshape(y * y, (BLOCK_M, WIDTH // SUM_BLOCK, SUM_BLOCK)), axis=2)


@triton.jit
def slices(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr):
    """(BLOCK_M, BLOCK_N) as a tuple of SLICES, 1 or 2, side by side."""
    if SLICES == 1:
        found = (acc,)
    else:
        tl.static_assert(SLICES == 2)
        found = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    return found


@triton.jit
def row_parts(sums_ptr, rows, M, PARTS: tl.constexpr):
    """(PARTS, M) float32 as a tuple of (BLOCK_M,)."""
    parts = ()
    for part in tl.static_range(PARTS):
        at = rows.to(tl.int64) + part * M.to(tl.int64)
        values = tl.load(sums_ptr + at, mask=rows < M, other=0.0)
        parts = parts + (values,)  # type: ignore[assignment]
    return parts


@triton.jit
def row_sums(parts, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sum over the parts of `row_parts`: (BLOCK_M,).

    One after another: an order that tl.sum would choose by the shape of the tile.
    """
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(PARTS):
        total += parts[part]
    return total
