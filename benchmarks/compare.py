"""Did the engine get slower? One result file against an earlier one of the same processor.

    python -P benchmarks/compare.py NEW [OLD]

OLD is by default the newest committed file of the same benchmark, device and processor. What is
compared is each engine row's speed-up over the baseline that was timed in turns with it: that
cancels how busy or hot the machine was. Exits 1 where one fell by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import harness
from contest import OURS

# What may differ between runs beside what their quartiles show: chosen, not measured.
DRIFT = 0.03
SAME = ("name", "family", "model", "threads", "cores")
Row = Mapping[str, Any]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One engine row in two files: speed-ups, and by what share the new one may be lower."""

    row: str
    old: float
    new: float | None
    tolerance: float
    reason: str = ""

    @property
    def slower(self) -> bool:
        return self.new is None or self.new < self.old * (1 - self.tolerance)

    def __str__(self) -> str:
        verdict = "SLOWER" if self.slower else "ok"
        if self.new is None:
            return f"{verdict} {self.row}: {self.old:.3f}x before, no figure now: {self.reason}"
        return (
            f"{verdict} {self.row}: {self.new:.3f}x of the baseline, {self.old:.3f}x before "
            f"({self.new / self.old - 1:+.1%}, spread and drift allow {-self.tolerance:.1%})"
        )


def _spread(row: Row) -> float:
    return (row["high"] - row["low"]) / row["median"]


def _rows(result: Result) -> dict[tuple[str, str, int], Row]:
    rows = result["rows"]
    if result["name"] == "ops":
        rows = [flat for row in rows for flat in _implementations(row, result["baseline"])]
    return {(row["name"], row["model"], row["batch"]): row for row in rows}


def _implementations(row: Row, baseline: str) -> Iterator[Row]:
    """The row of an op as two of the shape that `encode` has: ours, and the baseline."""
    facts = {"model": f"{row['model']} {row['op']} {row['precision']}", "batch": row["batch"]}
    if "refused" in row:
        yield {"name": OURS, **facts, "refused": row["refused"]}
        return
    mine, other = row[row["ours"]], row[baseline]
    yield {"name": OURS, **facts, **mine, "speedup": other["median"] / mine["median"]}
    yield {"name": baseline, **facts, **other}


def changes(new: Result, old: Result) -> list[Change]:
    """Every engine row that has a figure in `old`, where `new` ran that batch of that model.

    A ratio's tolerance is DRIFT plus the root of the squared interquartile ranges, relative to
    their medians, of the four timings it comes from: row and baseline, then and now.
    """
    before, after = _rows(old), _rows(new)
    ran = {key[1:] for key in after}
    found = []
    for (name, model, batch), row in before.items():
        if not name.startswith(OURS) or "refused" in row or (model, batch) not in ran:
            continue
        label = f"{name.strip()}, {model}, batch {batch}"
        now = after.get((name, model, batch))
        if now is None or "refused" in now:
            reason = "no such row" if now is None else now["refused"]
            found.append(Change(label, row["speedup"], None, DRIFT, reason))
            continue
        four = [
            row,
            before[old["baseline"], model, batch],
            now,
            after[new["baseline"], model, batch],
        ]
        tolerance = DRIFT + math.sqrt(sum(_spread(timing) ** 2 for timing in four))
        found.append(Change(label, row["speedup"], now["speedup"], tolerance))
    return found


def same_machine(new: Result, old: Result) -> bool:
    """Whether the two processors call themselves the same, with as many threads."""
    return all(new["processor"].get(key) == old["processor"].get(key) for key in SAME)


def committed(folder: Path) -> list[Path]:
    """The files that git holds under `folder`."""
    done = subprocess.run(
        ["git", "-C", str(folder), "ls-tree", "-r", "--name-only", "HEAD", "."],
        capture_output=True,
        text=True,
        check=True,
    )
    return [folder / line for line in done.stdout.splitlines()]


def stored(new: Result, device: str, path: Path | None = None) -> tuple[Path, Result] | None:
    """The newest committed result to compare `new` with, other than `path` itself."""
    candidates = []
    for file in committed(harness.RESULTS / device):
        if file.name.endswith(f"-{new['name']}.json") and file.exists() and file != path:
            old = json.loads(file.read_text())
            if "processor" in old and same_machine(new, old):
                candidates.append(((old["date"], old.get("time", "")), file, old))
    if not candidates:
        return None
    _, file, old = max(candidates, key=lambda item: item[0])
    return file, old


def report(path: Path, earlier: Path | None = None) -> tuple[list[str], bool]:
    """Lines to print, and whether anything got slower.

    Raises:
        ValueError: `earlier` is of another processor or benchmark.
    """
    path = path.resolve()
    new = json.loads(path.read_text())
    if earlier is not None:
        old = json.loads(earlier.read_text())
        if new["name"] != old["name"] or not same_machine(new, old):
            raise ValueError(f"{earlier} is of another benchmark or processor than {path}")
    elif found := stored(new, path.parent.name, path):
        earlier, old = found
    else:
        return ["nothing stored of this processor to compare with"], False
    found_changes = changes(new, old)
    if not found_changes:
        return [f"no engine row in common with {earlier.name}"], False
    lines = [f"against {earlier.name}, commit {old['commit']}:"]
    lines += [f"  {change}" for change in found_changes]
    return lines, any(change.slower for change in found_changes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    try:
        lines, slower = report(options.new, options.old)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
