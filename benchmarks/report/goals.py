"""The goals of the design, and what a result file says of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from harness.results import COMPILED_BF16, EAGER_FP32, Result, Row, is_ours, problem
from report.tables import named, own

from stellar_fast.config import MODELS

H, L, B = "stellar-h16", "stellar-l16", "stellar-b16"


class Missing(Exception):
    """There is no figure; the message says why."""


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes:
        needed: at least, or at most where `at_most`.
        form: how its numbers are written.
        find: the number in a result file, and what to add in words; raises Missing.
    """

    text: str
    needed: float
    form: str
    find: Callable[[Any], tuple[float, str]]
    at_most: bool = False

    def line(self, source: Any, counts: str) -> list[str]:
        """The cells of a row; `counts` is why a figure does not count, or empty."""
        bound = ("at most " if self.at_most else "at least ") + self.form.format(self.needed)
        try:
            found, words = self.find(source)
        except Missing as reason:
            return [self.text, bound, str(reason), "", ""]
        share = self.needed / found if self.at_most else found / self.needed
        met = counts or ("yes" if share >= 1 else "no")
        return [self.text, bound, f"{self.form.format(found)}{words}", f"{share:.2f}", met]


def _figure(row: Row | None, field: str) -> Any:
    if row is None or (field not in row and not problem(row)):
        raise Missing("not measured")
    if reason := problem(row):
        raise Missing(reason.replace("not run", "not measured"))
    return row[field]


def _older(row: Row | None) -> str:
    """Whose figure it is, where an older commit's."""
    return f" (commit {row['of_commit']})" if row and "of_commit" in row else ""


def encoded(result: Result, model: str, batch: int, precision: str) -> Row | None:
    """Our row of `encode`, else of the sweep."""
    key = f"{model}/b{batch}/{precision}"
    return own(result, "encode", key) or own(result, "sweep", key)


def _encode(model: str, batch: int, precision: str, field: str) -> Callable:
    def find(result: Result) -> tuple[float, str]:
        row = encoded(result, model, batch, precision)
        return _figure(row, field), _older(row)

    return find


def _compile(model: str, batch: int, precision: str) -> Callable:
    def find(result: Result) -> tuple[float, str]:
        job = ("compile", f"{model}/b{batch}/compile")
        theirs = _figure(named(result, *job, COMPILED_BF16) or own(result, *job), "median")
        return theirs / _figure(named(result, *job, f"engine {precision}"), "median"), ""

    return find


def _milliseconds(model: str, precision: str) -> Callable:
    def find(result: Result) -> tuple[float, str]:
        row = encoded(result, model, 1, precision)
        tail = _figure(row, "latency_p99")
        words = f" (99th percentile {1e3 * tail:.2f} ms){_older(row)}"
        return 1e3 * _figure(row, "latency_median"), words

    return find


def _eager(result: Result) -> tuple[float, str]:
    """The smallest speed-up over eager float32 of any model from batch 8 on."""
    ratios = {}
    for stage in ("encode", "sweep"):
        for row in result.rows(stage, name=EAGER_FP32):
            ours = own(result, stage, row["key"])
            if row["batch"] >= 8 and "median" in row and row["precision"] != "fp32" and ours:
                name = (row["model"], row["batch"], row["precision"])
                ratios[name] = row["median"] / ours["median"]
    if not ratios:
        raise Missing("not measured")
    model, batch, precision = least = min(ratios, key=lambda name: ratios[name])
    models = len({name[0] for name in ratios})
    where = f" ({model}, batch {batch}, {precision}; the least of {len(ratios)} points"
    return ratios[least], f"{where}, {models} of {len(MODELS)} models)"


def _violations(result: Result) -> tuple[float, str]:
    row = next(iter(result.rows("audit")), None)
    if row is None:
        raise Missing("not measured in this run; CI audits every part")
    if "failed" in row:
        raise Missing(f"failed: {row.get('summary', row['failed'])}")
    return 1.0, f" ({row['summary']})"


def _accuracy(result: Result) -> tuple[float, str]:
    rows = [
        row
        for stage in ("encode", "sweep", "curves")
        for row in result.rows(stage)
        if is_ours(row) and ("median" in row or "refused" in row)
    ]
    if not rows:
        raise Missing("not measured")
    kept = sum("refused" not in row for row in rows)
    return kept / len(rows), f" ({kept} of {len(rows)} rows)"


def _cpu(batch: int, precision: str, rival: str) -> Callable:
    """Our images/s at `precision` over a rival's, on a CPU with bf16 matrix units."""

    def find(result: Result | None) -> tuple[float, str]:
        if result is None or not result.facts["processor"]["bf16_matrix_units"]:
            raise Missing("not measured: no CPU with bf16 matrix units was at hand")
        rows = {row["name"]: row for row in result.rows("encode", batch=batch)}
        ours = _figure(rows.get(f"engine {precision}"), "median")
        return _figure(rows.get(rival), "median") / ours, ""

    return find


def _never(source: Any) -> tuple[float, str]:
    raise Missing("not measured")


RATE, TIMES, TIME, SHARE = "{:,.0f} images/s", "{:.2f}x", "{:.2f} ms", "{:.0%}"
GPU_GOALS = (
    Goal("H/14, batch 64, bf16: of the matrix ceiling", 0.85, SHARE,
         _encode(H, 64, "bf16", "of_ceiling")),
    Goal("H/14, batch 64, bf16", 1880, RATE, _encode(H, 64, "bf16", "images_per_second")),
    Goal("the same against torch.compile max-autotune of the reference in bf16", 1.3, TIMES,
         _compile(H, 64, "bf16")),
    Goal("H/14, batch 64, fp8", 3000, RATE, _encode(H, 64, "fp8", "images_per_second")),
    Goal("the same against that torch.compile", 2.0, TIMES, _compile(H, 64, "fp8")),
    Goal("L/16, batch 64, fp8 (aim 8,000)", 6500, RATE,
         _encode(L, 64, "fp8", "images_per_second")),
    Goal("B/16, batch 64, bf16", 16000, RATE,
         _encode(B, 64, "bf16", "images_per_second")),
    Goal("B/16, batch 64, fp8 (an aim)", 25000, RATE,
         _encode(B, 64, "fp8", "images_per_second")),
    Goal("H/14, one image, bf16", 1.1, TIME, _milliseconds(H, "bf16"), at_most=True),
    Goal("H/14, one image, fp8", 0.85, TIME, _milliseconds(H, "fp8"), at_most=True),
    Goal("B/16, one image, bf16", 0.3, TIME, _milliseconds(B, "bf16"), at_most=True),
    Goal("any model, batch 8 or more, against the eager fp32 reference", 10, TIMES, _eager),
    Goal("kernels without spills, within shared memory, on matrix instructions", 1, SHARE,
         _violations),
    Goal("rows whose error is within twice plain PyTorch's", 1, SHARE, _accuracy),
    Goal("extraction: of the engine's own rate on ready tensors", 0.95, SHARE, _never),
)  # fmt: skip
CPU_GOALS = (
    Goal("CPU with bf16 matrix units, B/16, batch 8, against eager fp32", 7, TIMES,
         _cpu(8, "bf16", "reference fp32 eager")),
    Goal("the same against OpenVINO bf16", 1.4, TIMES, _cpu(8, "bf16", "OpenVINO bf16")),
    Goal("the same at batch 1", 1, TIMES, _cpu(1, "bf16", "OpenVINO bf16")),
)  # fmt: skip


def lines(measured: Result, cpu: Result | None) -> Iterator[list[str]]:
    """The table's rows; a figure does not count unless the tests were green at its commit."""
    tests = next(iter(measured.rows("tests") or measured.rows("smoke")), None)
    counts = ""
    if tests is None:
        counts = "does not count: tests not run"
    elif "failed" in tests:
        counts = "does not count: tests red"
    elif not re.fullmatch("[0-9a-f]+", measured.facts["commit"]):
        counts = "does not count: not a commit"
    for goal in GPU_GOALS:
        yield goal.line(measured, counts)
    for goal in CPU_GOALS:
        yield goal.line(cpu, "")
