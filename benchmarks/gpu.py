"""Everything that a GPU lent for minutes is asked, in order of importance, each part bounded.

The result file is written after every row, so a run cut short leaves a true one; the next run
goes on with what the file lacks for the same device and commit. Every part has a process of its
own: one that crashes or outlasts its time is recorded as failed, and the rest goes on.

    python -P benchmarks/gpu.py [--parts ceilings encode] [--dry-run] [--minutes 9] [--resume FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

from harness import RESULTS, commit, versions

MOST_MINUTES = 9.0


@dataclass(frozen=True)
class Part:
    """One question to the device; `seconds` bounds it."""

    name: str
    seconds: float
    command: tuple[str, ...]


def _part(name: str, seconds: float) -> Part:
    script = str(Path(__file__).parent / "gpu_parts.py")
    return Part(name, seconds, (sys.executable, "-P", script, name))


PARTS = (
    _part("environment", 30),
    _part("tests", 150),
    _part("ops", 150),
    _part("ceilings", 40),
    _part("encode", 180),
    _part("sweep", 300),
)


class Results:
    """A result file that is whole at every moment."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**facts, "rows": []}
        if path.exists():
            found = json.loads(path.read_text())
            for name in ("commit", "device"):
                if found.get(name) != facts[name]:
                    raise ValueError(
                        f"{path} was measured at {name} {found.get(name)!r}, this is "
                        f"{facts[name]!r}: leave out --resume"
                    )
            self.content = found

    def finished(self, part: str) -> set[str]:
        """Keys of the rows of `part` that need no second run: failures do."""
        return {
            row["key"]
            for row in self.content["rows"]
            if row["part"] == part and "failed" not in row
        }

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Appends or replaces the row of this key, and writes the file."""
        row = {"part": part, **row}
        same = (part, row["key"])
        kept = [r for r in self.content["rows"] if (r["part"], r["key"]) != same]
        self.content["rows"] = [*kept, row]
        self._write()

    def clear(self, part: str, key: str) -> None:
        """Takes an earlier failure out."""
        rows = self.content["rows"]
        self.content["rows"] = [r for r in rows if (r["part"], r["key"]) != (part, key)]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        with beside.open("w") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def run_part(part: Part, results: Results, seconds: float) -> bool:
    """Runs `part` for `seconds` at most, its rows added as they come; whether it finished.

    The process reads the keys already measured from its input, as a JSON list, and prints a row a
    line, each an object with a `key`; its last row has the key "finished".
    """
    if "finished" in results.finished(part.name):
        return True
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        part.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None
    reason, buffer = "", b""
    try:
        try:
            process.stdin.write(json.dumps(sorted(results.finished(part.name))).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died before it read; its exit status says so below
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, end - time.monotonic())):
                    reason = f"cut off after {seconds:.0f} s"
                    break
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in filter(None, lines):
                    results.add(part.name, json.loads(line))
        if not reason:
            try:
                status = process.wait(max(0.1, end - time.monotonic()))
                reason = f"exit status {status}" if status else ""
            except subprocess.TimeoutExpired:
                reason = f"cut off after {seconds:.0f} s"
    except ValueError as error:
        reason = f"printed what is no row: {error}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if not reason and "finished" not in results.finished(part.name):
        reason = "ended without its last row"
    if reason:
        results.add(part.name, {"key": "part", "failed": reason})
        return False
    results.clear(part.name, "part")
    results._write()
    return True


def run(parts: list[Part], results: Results, minutes: float) -> bool:
    """All of `parts` within `minutes`; whether all of them finished."""
    end, whole = time.monotonic() + 60 * minutes, True
    for part in parts:
        left = min(part.seconds, end - time.monotonic())
        if left < 1:
            print(f"{part.name}: no time left; run again with --resume {results.path}")
            whole = False
            continue
        finished = run_part(part, results, left)
        print(f"{part.name}: {'finished' if finished else 'not finished'}", flush=True)
        whole &= finished
    return whole


def device_name() -> str | None:
    """Of the first CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument("--dry-run", action="store_true", help="list the parts and their bounds")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES)
    parser.add_argument("--resume", type=Path, help="a result file of this device and commit")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= MOST_MINUTES:
        parser.error(f"--minutes must be above 0 and at most {MOST_MINUTES:g}")
    parts = [part for part in PARTS if part.name in options.parts]
    if options.dry_run:
        for part in parts:
            print(f"{part.name:12} at most {part.seconds:4.0f} s")
        print(f"in all at most {60 * options.minutes:.0f} s in one run")
        return 0
    device = device_name()
    if device is None:
        print("no CUDA device on this machine; --dry-run lists what would run", file=sys.stderr)
        return 1
    now = datetime.datetime.now(datetime.UTC)
    facts = {
        "name": "gpu",
        "device": device,
        "date": now.date().isoformat(),
        "time": now.time().isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "command": "python -P benchmarks/gpu.py",
    }
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = options.resume or RESULTS / folder / f"{facts['date']}-{facts['commit']}.json"
    try:
        results = Results(path, facts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if run(parts, results, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
