"""The least time that work can take on a machine whose ceilings were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harness.results import Row, is_ours


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
