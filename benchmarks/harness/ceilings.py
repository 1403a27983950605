"""What the machine can do, measured in the same run: a large matrix product, and a device copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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


def rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """FLOP/s by precision, and bytes/s of "copy", from the rows of a `gpu.py` result file."""
    found = {}
    for row in rows:
        if row["part"] == "ceilings":
            if "tflops" in row:
                found[row["key"]] = row["tflops"] * 1e12
            elif "gb_per_second" in row:
                found[row["key"]] = row["gb_per_second"] * 1e9
    return found


def with_floor(row: dict[str, Any], known: Mapping[str, float]) -> dict[str, Any]:
    """`row` with its floor by `rates` of its run, where it has flops, bytes and a time of ours.

    Adds `floor` (seconds), `bound`, `of_floor` (floor over time), and `of_ceiling`: the share of
    the matrix ceiling of its precision that its FLOPs reach, which for a model is its utilisation.
    """
    ours = row.get(row.get("ours", "engine"))
    rate, copy = known.get(row.get("precision", "")), known.get("copy")
    if "flops" not in row or not isinstance(ours, dict) or rate is None or copy is None:
        return row
    floor = Floor.of(row["flops"], row["bytes"], rate, copy)
    return {
        **row,
        "floor": floor.seconds,
        "bound": floor.bound,
        "of_floor": floor.seconds / ours["median"],
        "of_ceiling": row["flops"] / ours["median"] / rate,
    }


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
