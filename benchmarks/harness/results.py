"""Timing of alternatives side by side, and the result file that a figure is taken from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

SUMMARY: list[str] = []  # lines that `pytest benchmarks/` prints at its end
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "openvino", "onnxruntime", "transformers", "triton")


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and quartiles over `rounds` calls."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


class Alternation:
    """Times several functions in turn, so that a drift of the machine's speed hits them alike."""

    def __init__(self, functions: Mapping[str, Callable[[], object]], warmup: int = 2) -> None:
        self.functions = dict(functions)
        self.seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in self.functions.values():
            for _ in range(warmup):
                function()

    def round(self) -> None:
        """One timed call of each function."""
        for name, function in self.functions.items():
            start = time.perf_counter()
            function()
            self.seconds[name].append(time.perf_counter() - start)

    def timings(self) -> dict[str, Timing]:
        return {name: Timing.of(seconds) for name, seconds in self.seconds.items()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference over that of `exact`, in float64."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each output; an output that is missing is an AssertionError."""
    for name in exact:
        assert name in found, f"{name}: no such output"
    return {name: relative_error(found[name], exact[name]) for name in exact}


def over_budget(measured: Mapping[str, float], plain: Mapping[str, float]) -> str | None:
    """The first error that exceeds twice plain PyTorch's at that dtype, in words."""
    for name, error in measured.items():
        budget = 2 * plain[name]
        if not error <= budget:  # nor is NaN
            return f"{name}: error {error:.2e} exceeds its budget {budget:.2e}"
    return None


def within_budget(
    found: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Raises AssertionError unless every error is at most twice plain PyTorch's at that dtype.

    No figure is written for a result that fails this.
    """
    reason = over_budget(errors(found, exact), errors(plain, exact))
    if reason is not None:
        raise AssertionError(reason)


def processor() -> dict[str, object]:
    """What the CPU calls itself and the instruction sets that decide bf16 speed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "bf16_matrix_units": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured; "-dirty" where the code differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    files = [Path(path) for m in sys.modules.values() if (path := getattr(m, "__file__", None))]
    here = [
        str(path) for path in files if path.parent == ROOT / "benchmarks"
    ]  # the benchmarks at work
    changed = git("status", "--porcelain", "--", "stellar_fast", "kernels", "reference", *here)
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def folder_of(device: str) -> str:
    """The folder under `results` for a device of this name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_result(device: str, name: str, rows: list[dict], **facts: object) -> Path:
    """Writes `results/<device>/<date>-<commit>-<name>.json` and returns its path."""
    now = datetime.datetime.now(datetime.UTC)
    today = now.date().isoformat()
    result = {
        "name": name,
        "date": today,
        "time": now.time().isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        **facts,
        "rows": rows,
    }
    path = RESULTS / device / f"{today}-{result['commit']}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def row(timing: Timing, images: int, **facts: object) -> dict[str, object]:
    """One line of a result file."""
    return {**facts, **asdict(timing), "images_per_second": images / timing.median}
