"""The process of a stage: it adds the rows of its jobs to the result file, which is its output.

A row that takes longer than its limit ends the process, and the end of standard input, which is
that of the command, ends it with all that it started.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from harness.floors import rates, with_floor
from harness.results import PROBLEMS, Result, Row, lines_of, read

# Exit statuses.
FAILED = 3  # there are rows without a figure
RESTART = 75  # the device is lost to this process
HUNG = 1  # faulthandler's: a row took longer than its limit


# What a line tells of a row beside its time.
TOLD = (
    "images_per_second", "of_ceiling", "of_floor", "rate", "cuda_graphs", "count", "seconds",
    "first_call_seconds", "load_seconds", "latency_median", "joules_per_image", "summary",
)  # fmt: skip


class Job(NamedTuple):
    """A row to be measured.

    Attributes:
        limit: seconds after which the process is ended.
        outlasted: the row in that case; a failure if None.
    """

    key: str
    run: Callable[[], list[Row]]
    limit: float = 90.0
    outlasted: Row | None = None


def told(row: Row) -> str:
    """A row in a line, for who watches the run."""
    line = f"  {row['key']:36} {row['name']:24}"
    why = next((f"{name}: {row[name]}" for name in PROBLEMS if name in row), None)
    if why is not None:
        return f"{line} {why}"
    if "median" in row:
        line += f" {row['median'] * 1e6:10.1f} us"
    if "high" in row:
        line += f", quartiles {(row['high'] - row['low']) / row['median']:.1%} apart"
    facts = {name: row[name] for name in TOLD if row.get(name) is not None}
    return line + "".join(f", {name} {_short(value)}" for name, value in facts.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def work(
    stage: str,
    jobs: Iterable[Job],
    is_lost: Callable[[], bool],
    earlier: Result,
    write: Callable[[Any], object],
) -> int:
    """Every job of `stage` that has no figure yet: the exit status.

    What this run has tried already is left out; `write` gets the lines of the file.
    """
    status, known = 0, rates(earlier.rows("ceilings"))
    for job in jobs:
        if earlier.has(stage, job.key):
            continue
        if (stage, job.key) in earlier.tried:
            status = FAILED
            continue
        place = {"stage": stage, "key": job.key}
        begin: Row = {"begin": job.key, "stage": stage, "limit": job.limit}
        write(begin if job.outlasted is None else {**begin, "outlasted": place | job.outlasted})
        faulthandler.dump_traceback_later(job.limit, exit=True)
        try:
            rows = job.run()
        except Exception as error:
            rows = [{"name": "engine", "failed": f"{type(error).__name__}: {error}"[:2000]}]
        faulthandler.cancel_dump_traceback_later()
        gone = is_lost()
        if gone and not any("failed" in row for row in rows):
            rows = [{"name": "engine", "failed": "the device was lost in this row"}]
        rows = [with_floor({**row, **place}, known) for row in rows]
        write(rows)
        print("\n".join(map(told, rows)), file=sys.stderr, flush=True)
        if gone:
            return RESTART
        if any("failed" in row for row in rows):
            status = FAILED
    return status


def _end_with_the_command() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main(jobs: Callable[[str], Iterable[Job]], is_lost: Callable[[], bool]) -> int:
    """Takes the stage, the file and an expression for keys from the command line."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no row
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    stage, path, only = sys.argv[1:]
    earlier = read(Path(path))
    wanted = (job for job in jobs(stage) if re.search(only, job.key))
    return work(stage, wanted, is_lost, earlier, lambda line: os.write(out, lines_of([line])))
