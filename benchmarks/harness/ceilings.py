"""What the machine can do, measured in the same run: a large matrix product, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from harness.results import Row, is_ours
from harness.timing import in_turns, rows_of, turns_of
from harness.workloads import DTYPES

SIDES = {"cuda": 8192, "cpu": 4096}  # of the matrices
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes; read once and written once


def floor(flops: float, moved: float, flops_rate: float, bytes_rate: float) -> tuple[float, str]:
    """The least seconds that an op can take here, and what decides it, "flops" or "bytes"."""
    compute, memory = flops / flops_rate, moved / bytes_rate
    return (compute, "flops") if compute >= memory else (memory, "bytes")


def rates(rows: Iterable[Row]) -> dict[str, float]:
    """FLOP/s by precision, and bytes/s of "copy", from the rows of the stage "ceilings"."""
    return {row["key"]: row["rate"] for row in rows if "rate" in row}


def with_floor(row: Row, known: Mapping[str, float]) -> Row:
    """`row` with its floor by `rates` of its run, where it is ours and has flops, bytes, a time.

    Adds `floor` (seconds), `bound`, `of_floor` (floor over time), and `of_ceiling`: the share of
    the matrix ceiling of its precision that its FLOPs reach, which for a model is its utilisation.
    """
    rate, copy = known.get(row.get("precision", "")), known.get("copy")
    if "flops" not in row or "median" not in row or not is_ours(row) or not rate or not copy:
        return row
    seconds, bound = floor(row["flops"], row["bytes"], rate, copy)
    return {
        **row,
        "floor": seconds,
        "bound": bound,
        "of_floor": seconds / row["median"],
        "of_ceiling": row["flops"] / row["median"] / rate,
    }


def product(precision: str, device: torch.device, side: int) -> Callable[[], object]:
    """A square matrix product by the vendor's library, on random operands."""
    dtype = DTYPES[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if precision != "fp8":
        return lambda: torch.mm(a, b.T)
    one = torch.ones((), device=device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


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
