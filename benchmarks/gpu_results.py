"""Reads result files of `gpu.py`, of the CPU benchmark, and kept predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceilings import rates, with_floor

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A result file of `gpu.py`: its rows by part and key, and its ceilings."""

    path: Path
    result: Row

    @property
    def ceilings(self) -> dict[str, float]:
        """FLOP/s by precision, and bytes/s of "copy"."""
        return rates(self.result["rows"])

    def rows(self, part: str) -> list[Row]:
        """The rows of a part that are no bookkeeping, with their floors."""
        return [
            with_floor(row, self.ceilings)
            for row in self.result["rows"]
            if row["part"] == part and row["key"] not in ("part", "finished")
        ]

    def row(self, part: str, key: str) -> Row | None:
        return next((row for row in self.rows(part) if row["key"] == key), None)

    def encode(self, model: str, batch: int, precision: str) -> Row | None:
        """The row of `encode`, else of the sweep."""
        key = f"{model}/b{batch}/{precision}"
        return self.row("encode", key) or self.row("sweep", key)

    @property
    def tests(self) -> Row | None:
        return self.row("tests", "tests")

    @property
    def where(self) -> str:
        """Device, dates, commit, versions, command, tests, ceilings and file, for below a table."""
        result, versions = self.result, self.result["versions"]
        dates = sorted({run["date"] for run in result.get("runs", [])} or {result["date"]})
        rates = [
            f"{name} {rate / 1e9:.0f} GB/s" if name == "copy" else f"{name} {rate / 1e12:.0f}"
            for name, rate in self.ceilings.items()
        ]
        tests = self.tests
        green = "not run" if tests is None else ("RED: " * ("failed" in tests)) + tests["summary"]
        names = [name for name in ("torch", "triton") if name in versions]
        packages = ", ".join(f"{name} {versions[name]}" for name in names)
        place = self.path.relative_to(RESULTS.parent.parent).as_posix()
        return (
            f"{result['device']}, {' and '.join(dates)}, commit {result['commit']}, {packages}; "
            f"`{result['command']}`; GPU tests at that commit: {green}; ceilings of the same run, "
            f"in TFLOP/s: {', '.join(rates) or 'not measured'}; `{place}`."
        )


def _files(folder: Path, name: str) -> Iterator[tuple[Path, Row]]:
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("name") == name:
            yield path, result


def newest() -> Measured | None:
    """The latest result file of `gpu.py`, whatever the device."""
    found = [
        ((last["date"], last["time"]), path, result)
        for folder in sorted(RESULTS.glob("*/"))
        for path, result in _files(folder, "gpu")
        for last in [(result.get("runs") or [result])[-1]]
    ]
    if not found:
        return None
    _, path, result = max(found, key=lambda item: item[:2])
    return Measured(path, result)


def newest_cpu() -> Row | None:
    """The latest result of the CPU benchmark."""
    found = [result for _, result in _files(RESULTS / "cpu", "encode")]
    return max(found, key=lambda result: (result["date"], result.get("time", "")), default=None)


def newest_predictions() -> Row | None:
    """The latest file of `predict.py --json` that was kept."""
    found = list(_files(RESULTS / "predicted", "predicted"))
    return max(found, key=lambda item: (item[1]["date"], item[1]["time"]))[1] if found else None
