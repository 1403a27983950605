"""What the machine can do, measured in the same run: a large matrix product, and a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness.results import Row
from harness.timing import in_turns, rows_of, turns_of
from harness.workloads import DTYPES

SIDES = {"cuda": 8192, "cpu": 4096}  # of the matrices
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes; read once and written once


def product(precision: str, device: torch.device, side: int) -> Callable[[], object]:
    """A square matrix product by the vendor's library, on random operands."""
    dtype = DTYPES[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if precision != "fp8":
        return lambda: torch.mm(a, b.T)
    one = torch.ones((), device=device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    # As our products are: without it the sums are taken out of the matrix units every few steps,
    # which no product of ours does so often, and the ceiling would flatter them.
    return lambda: torch._scaled_mm(
        a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def measure(key: str, device: torch.device, seconds: float = 2.0, least: int = 5) -> Row:
    """The row of one precision, or of "copy"; `rate` in FLOP/s or bytes/s."""
    side, size = SIDES[device.type], COPIED[device.type]
    if key == "copy":
        source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        call: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731
        name, work = "copy", 2.0 * size
    else:
        call, name, work = product(key, device, side), "product", 2.0 * side**3
    taken, _ = in_turns(turns_of({name: [call]}, device), least=least, seconds=seconds, warmup=2)
    (row,) = rows_of(taken, stage="ceilings", key=key)
    return {**row, "rate": work / row["median"]}
