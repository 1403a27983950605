"""Running a part of `gpu.py` in processes of its own, and the result file that its rows go to.

A process reads the keys that need no second run from its input, as a JSON list, and prints an
object a line: `{"begin": key, "limit": seconds}` before a row, then the row, which has that `key`;
the last row has the key "finished". A process that crashes, hangs in a row for longer than its
limit, or exits with RESTART is started again behind the row that did it, a few times at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ceilings import rates, with_floor

RESTART = 75  # exit status of a process whose CUDA context is lost
MOST_RESTARTS = 4  # of one part in one run
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One question to the device; `seconds` bounds it."""

    name: str
    seconds: float
    command: tuple[str, ...]


class Results:
    """A result file that is whole at every moment.

    Args:
        path: where it is written; what it holds already is kept.
        earlier: a file of the same device and commit to go on from where `path` is not there yet.

    Raises:
        ValueError: the file is of another device or commit.
    """

    def __init__(self, path: Path, facts: Row, earlier: Path | None = None) -> None:
        self.path = path
        self.content: Row = {**facts, "runs": [], "rows": []}
        source = path if path.exists() else earlier
        if source is not None:
            found = json.loads(source.read_text())
            for name in ("commit", "device"):
                if found.get(name) != facts[name]:
                    raise ValueError(
                        f"{source} was measured at {name} {found.get(name)!r}, this is "
                        f"{facts[name]!r}: leave out --resume"
                    )
            self.content = {"runs": [], **found}
        run = {name: facts[name] for name in ("date", "time", "versions") if name in facts}
        self.content["runs"].append(run)

    def finished(self, part: str) -> set[str]:
        """Keys of the rows of `part` that need no second run: failures do."""
        return {
            row["key"]
            for row in self.content["rows"]
            if row["part"] == part and "failed" not in row
        }

    def add(self, part: str, row: Row) -> None:
        """Appends or replaces the row of this key, with its floor, and writes the file."""
        row = with_floor({"part": part, **row}, rates(self.content["rows"]))
        same = (part, row["key"])
        kept = [r for r in self.content["rows"] if (r["part"], r["key"]) != same]
        self.content["rows"] = [*kept, row]
        self._write()

    def clear(self, part: str, key: str) -> None:
        """Takes an earlier failure out."""
        rows = self.content["rows"]
        self.content["rows"] = [r for r in rows if (r["part"], r["key"]) != (part, key)]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        with beside.open("w") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


@dataclass
class _Attempt:
    """One process of a part.

    Attributes:
        begun: what it said before the row it is in; its limit ends at `limit_end`.
        failed: keys of rows that failed in it.
        behind: rows without a figure that a further process leaves out.
        reason: why the part did not finish; empty if it did.
        again: whether another process may go on.
    """

    begun: Row | None = None
    limit_end: float = float("inf")
    failed: set[str] = field(default_factory=set)
    behind: set[str] = field(default_factory=set)
    reason: str = ""
    again: bool = False

    def take(self, part: Part, results: Results, line: Row, spoilt: bool) -> None:
        """A line that the process printed; `spoilt`: rows have failed before."""
        if "begin" in line:
            self.begun, limit = line, line.get("limit", float("inf"))
            self.limit_end = time.monotonic() + limit
            return
        key = line["key"]
        self.begun, self.limit_end = None, float("inf")
        if "failed" in line:
            self.failed.add(key)
            self.behind.add(key)
        if key == "finished" and (spoilt or self.failed):
            return  # another run has rows to repeat
        results.add(part.name, line)

    def lost(self, part: Part, results: Results, why: str) -> None:
        """The process is gone in the middle of a row, which another one leaves out."""
        assert self.begun is not None
        key = self.begun["begin"]
        row = self.begun.get("outlasted") if "no result" in why else None
        if row is None:
            row = {"failed": why}
            self.failed.add(key)
        self.behind.add(key)
        results.add(part.name, {"key": key, **row})
        self.reason, self.again = f"{key}: {why}", True


def _lines(process: subprocess.Popen, attempt: _Attempt, end: float) -> Iterator[Row]:
    """What the process prints, until it ends or time is up, which `attempt.reason` then says."""
    assert process.stdout is not None
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = min(end, attempt.limit_end) - time.monotonic()
            if not selector.select(max(0.0, left)):
                attempt.reason = "time is up"
                return
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in filter(None, lines):
                yield json.loads(line)


def _attempt(part: Part, results: Results, end: float, behind: set[str], spoilt: bool) -> _Attempt:
    """One process, to its end or until time is up."""
    attempt = _Attempt()
    process = subprocess.Popen(
        part.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        try:
            process.stdin.write(json.dumps(sorted(results.finished(part.name) | behind)).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died before it read; its exit status says so below
        for line in _lines(process, attempt, end):
            attempt.take(part, results, line, spoilt)
        if attempt.reason:
            if time.monotonic() < end and attempt.begun is not None:
                limit = attempt.begun["limit"]
                attempt.lost(part, results, f"no result within {limit:.0f} s")
            else:
                attempt.reason = "cut off"
        else:
            _judge(process.wait(max(0.1, end - time.monotonic())), attempt, part, results)
    except subprocess.TimeoutExpired:
        attempt.reason = "cut off"
    except (ValueError, TypeError, KeyError) as error:
        attempt.reason = f"printed what is no row: {error}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # compilers that it started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return attempt


def _judge(status: int, attempt: _Attempt, part: Part, results: Results) -> None:
    """What the exit status of a process says."""
    if status in (0, 1):
        attempt.reason = f"exit status {status}" if status else ""
    elif status == RESTART:
        attempt.reason, attempt.again = "the CUDA context was lost", True
    elif attempt.begun is not None:
        attempt.lost(part, results, f"the process died in this row, exit status {status}")
    else:
        attempt.reason = f"exit status {status}"


def run_part(part: Part, results: Results, seconds: float) -> bool:
    """Runs `part` for `seconds` at most, its rows added as they come; whether it finished."""
    if "finished" in results.finished(part.name):
        return True
    end = time.monotonic() + seconds
    behind: set[str] = set()
    failed: set[str] = set()
    for start in range(1 + MOST_RESTARTS):
        attempt = _attempt(part, results, end, behind, bool(failed))
        behind |= attempt.behind
        failed |= attempt.failed
        reason = attempt.reason
        if not attempt.again or time.monotonic() >= end:
            break
        if start == MOST_RESTARTS:
            reason = f"given up after {MOST_RESTARTS} restarts: {reason}"
    if reason == "cut off":
        reason = f"cut off after {seconds:.0f} s"
    if not reason and failed:
        reason = f"no figure for {', '.join(sorted(failed))}"
    if not reason and "finished" not in results.finished(part.name):
        reason = "ended without its last row"
    if reason:
        results.add(part.name, {"key": "part", "failed": reason})
        return False
    results.clear(part.name, "part")
    return True
