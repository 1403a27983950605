"""Everything that a GPU lent for minutes is asked, in order of importance, each stage bounded.

    python -P benchmarks/gpu/run.py [--stages ceilings encode] [--only REGEX] [--dry-run]
                                    [--minutes 9] [--out FOLDER] [--resume FILE | --fresh]
                                    [--commit HASH]

Every row is added to the result file when it is there, so a run cut short leaves a true one. The
same command again goes on with what the file lacks: it finds the newest file of the same device and
sources by itself, whatever the date. Every stage has a process of its own: a row that crashes,
hangs or loses the device costs only itself, and the rest goes on. Neither git nor an installed
package is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

from gpu.worker import FAILED, HUNG, RESTART
from harness import results
from harness.results import ROOT, ended, lines_of, read

MOST_MINUTES = 9.0
MOST_RESTARTS = 4  # of one stage in one run
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("stages.py")))


@dataclass(frozen=True)
class Stage:
    """One question to the device; `seconds` bounds it."""

    name: str
    seconds: float


# The first five fill one run, if each takes all of its time. Where they take what they took on an
# H200, a first run has the compiler's figure beside them: tests/benchmarks/test_gpu_rehearsal.py.
STAGES = (
    Stage("environment", 30),
    Stage("warm", 120),
    Stage("smoke", 120),
    Stage("ceilings", 40),
    Stage("encode", 210),
    Stage("compile", 290),
    Stage("ops", 120),
    Stage("compilers", 300),
    Stage("tune", 300),
    Stage("tests", 240),
    Stage("kernels", 240),
    Stage("waterfall", 200),
    Stage("audit", 100),
    Stage("sweep", 400),
    Stage("curves", 140),
)


def schedule(stages: Sequence[Stage], minutes: float) -> Iterator[tuple[Stage, list[int]]]:
    """Each stage, and the runs of `minutes` that it falls into where all take all their time."""
    run, left = 1, 60 * minutes
    for stage in stages:
        needed, runs = stage.seconds, []
        while needed > 0:
            if left <= 0:
                run, left = run + 1, 60 * minutes
            runs.append(run)
            taken = min(needed, left)
            needed, left = needed - taken, left - taken
        yield stage, runs


def listing(stages: Sequence[Stage], minutes: float) -> Iterator[str]:
    """What `--dry-run` prints."""
    last, first = 1, []
    for stage, runs in schedule(stages, minutes):
        last = runs[-1]
        first += [stage.name] * (runs == [1])
        when = f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} to {runs[-1]}"
        yield f"{stage.name:12} at most {stage.seconds:4.0f} s  {when}"
    yield (
        f"{sum(stage.seconds for stage in stages):.0f} s in all, runs of at most "
        f"{60 * minutes:.0f} s; if every stage takes all of its time, {last} of them"
    )
    yield f"a first run then holds {', '.join(first)}"
    yield (
        "the same command again goes on with the rest; give --resume FILE where the result file "
        "has been moved"
    )


def _process(stage: Stage, path: Path, file: BinaryIO, seconds: float, only: str) -> int | None:
    """One process of a stage: its exit status, or None where time was up."""
    command = [*COMMAND, stage.name, str(path), only]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, start_new_session=True)
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # compilers that it started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def run_stage(stage: Stage, path: Path, file: BinaryIO, seconds: float, only: str = "") -> str:
    """Runs `stage` for `seconds` at most; why it has not finished, or nothing.

    `only` of its rows whose key this expression finds: that is not all of it, and not said to be.
    """
    end = time.monotonic() + seconds
    for _ in range(1 + MOST_RESTARTS):
        if stage.name in read(path).finished:
            return ""
        status = _process(stage, path, file, end - time.monotonic(), only)
        result = read(path)
        begun = result.begun
        if begun is not None:
            why = f"the process died in this row, exit status {status}"
            if status is None:
                why = f"cut off, {stage.name} took {seconds:.0f} s"
            elif status == HUNG:
                why = f"no result within {begun['limit']:.0f} s"
            late = begun.get("outlasted") if status == HUNG else None
            file.write(lines_of([[late or ended(begun, why)]]))
        if status is None:
            return f"cut off after {seconds:.0f} s"
        if status == 0 and only:
            return ""
        if status == 0:
            file.write(lines_of([{"finished": stage.name}]))
            return ""
        if status == FAILED:
            bad = [k for (s, k) in result.jobs if s == stage.name and not result.has(s, k)]
            return f"no figure for {', '.join(sorted(bad))}"
        if begun is None and status != RESTART:
            return f"exit status {status}"  # outside of any row: it would end there again
    return f"given up after {MOST_RESTARTS} restarts"


def run(
    stages: Sequence[Stage], path: Path, file: BinaryIO, minutes: float, only: str = ""
) -> bool:
    """All of `stages` within `minutes`; whether all of them finished."""
    end, whole = time.monotonic() + 60 * minutes, True
    for stage in stages:
        left = min(stage.seconds, end - time.monotonic())
        why = "no time left; give the same command again to go on"
        if left >= 1:
            why = run_stage(stage, path, file, left, only)
        print(f"{stage.name}: {f'not finished: {why}' if why else 'finished'}", flush=True)
        whole &= not why
    return whole


def unfinished(stages: Sequence[Stage], path: Path) -> str:
    """The stages that the result file does not say to be finished."""
    finished = read(path).finished
    return ", ".join(stage.name for stage in stages if stage.name not in finished) or "nothing"


def device_name() -> str | None:
    """Of the first CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@contextlib.contextmanager
def linked(root: Path) -> Iterator[str]:
    """Within it, a folder from which the package of a checkout is imported, with its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "stellar_fast"
        package.mkdir()
        for path in (*(root / "stellar_fast").iterdir(), root / "kernels", root / "reference"):
            (package / path.name).symlink_to(path)
        yield folder


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Within it, processes can import the package, with its kernels, installed or not."""
    try:
        found = importlib.util.find_spec("stellar_fast.kernels") is not None
    except ModuleNotFoundError:
        found = False
    with linked(ROOT) as folder:
        if not found:
            before = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, before]))
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="rows whose key, model/bBATCH/…, it finds"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the stages and their bounds")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES)
    parser.add_argument("--out", type=Path, help="folder for the result file, not results/")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--resume", type=Path, help="a result file of this device and sources")
    source.add_argument("--fresh", action="store_true", help="repeat what was measured")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= MOST_MINUTES:
        parser.error(f"--minutes must be above 0 and at most {MOST_MINUTES:g}")
    stages = [stage for stage in STAGES if stage.name in options.stages]
    if options.dry_run:
        print("\n".join(listing(stages, options.minutes)))
        return 0
    device = device_name()
    if device is None:
        print("no CUDA device on this machine; --dry-run lists what would run", file=sys.stderr)
        return 1
    header = results.facts("gpu", "python -P benchmarks/gpu/run.py", device=device)
    header["commit"] = options.commit or header["commit"]
    folder = (options.out or results.RESULTS) / results.folder_of(device)
    try:
        path = results.going_on(folder, header, options.resume, options.fresh)
        with importable(), results.adding_to(path, header) as file:
            print(f"-> {path}\nto do: {unfinished(stages, path)}", flush=True)
            done = run(stages, path, file, options.minutes, options.only)
            print(f"left: {unfinished(stages, path)}")
            return 0 if done else 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
