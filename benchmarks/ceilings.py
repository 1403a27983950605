"""What the machine can do, measured in the same run: a large matrix product, and a device copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_timing import time_in_turn

SIDE = 8192
COPIED = 1 << 30  # bytes; read once and written once


@dataclass(frozen=True)
class Floor:
    """The least seconds that an op can take here, and what decides it."""

    seconds: float
    bound: str

    @classmethod
    def of(cls, flops: float, moved: float, flops_rate: float, bytes_rate: float) -> Floor:
        """`flops_rate` in FLOP/s and `bytes_rate` in B/s."""
        compute, memory = flops / flops_rate, moved / bytes_rate
        return cls(compute, "flops") if compute >= memory else cls(memory, "bytes")


def product(precision: str, side: int = SIDE) -> Callable[[], object]:
    """A square matrix product by cuBLAS on random operands."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    if precision != "fp8":
        return lambda: torch.mm(a, b.T)
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def measure(precision: str, seconds: float = 2.0) -> dict[str, object]:
    """A row for one precision, or for "copy"; rates in TFLOP/s or GB/s."""
    if precision == "copy":
        source = torch.randint(0, 255, (COPIED,), device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        call: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731
    else:
        call = product(precision)
    timing = time_in_turn({precision: [call]}, seconds=seconds)[precision]
    work = 2 * COPIED / 1e9 if precision == "copy" else 2 * SIDE**3 / 1e12
    unit = "gb_per_second" if precision == "copy" else "tflops"
    return {
        "median": timing.median,
        "low": timing.low,
        "high": timing.high,
        unit: work / timing.median,
    }
