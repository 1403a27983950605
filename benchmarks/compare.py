"""Did the engine get slower? One result file against an earlier one of the same machine.

    python -P benchmarks/compare.py NEW [OLD]

OLD is by default the newest committed file of the same benchmark and kind of machine. What is
compared is the speed-up of each row of ours over the baseline that was timed in turns with it: that
cancels how busy or hot the machine was. Exits 1 where one fell by more than its tolerance.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

from harness import results
from harness.results import BASELINES, Result, Row, is_ours, problem, read

# What may differ between runs beside what their quartiles show: chosen, not measured.
DRIFT = 0.03


@dataclass(frozen=True)
class Change:
    """One row of ours in two files: speed-ups, and by what share the new one may be lower."""

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


def _pairs(result: Result) -> Iterator[tuple[tuple[str, str], Row, Row | None]]:
    """Each row of ours by key and name, with the baseline of its job if that has a figure."""
    for (stage, key), rows in result.jobs.items():
        base = [row for row in rows if row["name"] == BASELINES.get(stage) and "median" in row]
        for row in rows if stage in BASELINES else ():
            if is_ours(row):
                yield (key, row["name"]), row, next(iter(base), None)


def changes(new: Result, old: Result) -> list[Change]:
    """Every row of ours that has a figure in `old`, where `new` has that job.

    A ratio's tolerance is DRIFT plus the root of the squared interquartile ranges, relative to
    their medians, of the four timings it comes from: ours and the baseline's, then and now.
    """
    after = {place: (row, base) for place, row, base in _pairs(new)}
    ran = {key for _, key in new.jobs}
    found = []
    for (key, name), row, base in _pairs(old):
        if problem(row) or base is None or key not in ran:
            continue
        label, before = f"{name}, {key}", base["median"] / row["median"]
        now, base_now = after.get((key, name), (None, None))
        if now is None or problem(now) or base_now is None:
            reason = "no such row" if now is None else problem(now) or "the baseline has none"
            found.append(Change(label, before, None, DRIFT, reason))
            continue
        spreads = [(r["high"] - r["low"]) / r["median"] for r in (row, base, now, base_now)]
        tolerance = DRIFT + math.sqrt(sum(spread**2 for spread in spreads))
        found.append(Change(label, before, base_now["median"] / now["median"], tolerance))
    return found


def stored(new: Result) -> Result | None:
    """The newest committed result of the same benchmark and kind of machine."""
    command = ["git", "-C", str(results.RESULTS), "ls-tree", "-r", "--name-only", "HEAD", "."]
    done = subprocess.run(command, capture_output=True, text=True)  # without git there is none
    committed = {results.RESULTS / line for line in done.stdout.splitlines()}
    for old in results.found(new.facts["name"]):
        if (
            old.path in committed
            and old.path != new.path
            and results.kind(old) == results.kind(new)
        ):
            return old
    return None


def report(new: Result, old: Result | None = None) -> tuple[list[str], bool]:
    """Lines to print, and whether anything got slower.

    Raises:
        ValueError: `old` is of another kind of machine or another benchmark.
    """
    if old is None:
        old = stored(new)
        if old is None:
            return ["nothing stored of this kind of machine to compare with"], False
    elif new.facts["name"] != old.facts["name"] or results.kind(new) != results.kind(old):
        raise ValueError(f"{old.path} is of another benchmark or machine than {new.path}")
    every = changes(new, old)
    if not every:
        return [f"no row of ours in common with {old.path.name}"], False
    lines = [f"against {old.path.name}, commit {old.facts['commit']}:"]
    return [*lines, *(f"  {change}" for change in every)], any(change.slower for change in every)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    try:
        old = None if options.old is None else read(options.old.resolve())
        lines, slower = report(read(options.new.resolve()), old)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
