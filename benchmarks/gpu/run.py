"""Everything that a GPU lent for minutes is asked, in order of importance, each part bounded.

The result file is written after every row, so a run cut short leaves a true one. The same command
again goes on with what the file lacks: it finds the newest file of the same device and commit by
itself, whatever the date. Every part has processes of its own: what crashes or outlasts its time is
recorded as failed, and the rest goes on.

    python -P benchmarks/gpu.py [--parts ceilings encode] [--dry-run] [--minutes 9]
                                [--out FOLDER] [--resume FILE | --fresh] [--commit HASH]

The package must be importable: `pip install --no-deps --no-build-isolation -e .` needs no network.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import harness
from gpu_run import Part, Results, run_part

MOST_MINUTES = 9.0
SOURCES = ("stellar_fast", "kernels", "reference", "benchmarks/*.py")


def _part(name: str, seconds: float) -> Part:
    script = str(Path(__file__).parent / "gpu_parts.py")
    return Part(name, seconds, (sys.executable, "-P", script, name))


# The first five fill one run, if each takes all of its time.
PARTS = (
    _part("environment", 30),
    _part("ceilings", 30),
    _part("tests", 150),
    _part("encode", 210),
    _part("ops", 120),
    _part("compile", 300),
    _part("tune", 300),
    _part("kernels", 240),
    _part("waterfall", 200),
    _part("audit", 100),
    _part("sweep", 400),
    _part("curves", 140),
)


def schedule(parts: Sequence[Part], minutes: float) -> Iterator[tuple[Part, list[int]]]:
    """Each part, and the runs of `minutes` that it falls into where all take all of their time."""
    run, left = 1, 60 * minutes
    for part in parts:
        needed, runs = part.seconds, []
        while needed > 0:
            if left <= 0:
                run, left = run + 1, 60 * minutes
            runs.append(run)
            taken = min(needed, left)
            needed, left = needed - taken, left - taken
        yield part, runs


def listing(parts: Sequence[Part], minutes: float) -> Iterator[str]:
    """What `--dry-run` prints."""
    last = 1
    for part, runs in schedule(parts, minutes):
        last = runs[-1]
        when = f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} to {runs[-1]}"
        yield f"{part.name:12} at most {part.seconds:4.0f} s  {when}"
    first = [part.name for part, runs in schedule(parts, minutes) if runs == [1]]
    total = sum(part.seconds for part in parts)
    yield (
        f"{total:.0f} s in all, runs of at most {60 * minutes:.0f} s; if every part takes all of "
        f"its time, {last} of them"
    )
    yield f"a first run then holds {', '.join(first)}"
    yield (
        "the same command again goes on with the rest; give --resume FILE where the result file "
        "has been moved"
    )


def run(parts: Sequence[Part], results: Results, minutes: float) -> bool:
    """All of `parts` within `minutes`; whether all of them finished."""
    end, whole = time.monotonic() + 60 * minutes, True
    for part in parts:
        left = min(part.seconds, end - time.monotonic())
        if left < 1:
            print(f"{part.name}: no time left; give the same command again to go on")
            whole = False
            continue
        finished = run_part(part, results, left)
        print(f"{part.name}: {'finished' if finished else 'not finished'}", flush=True)
        whole &= finished
    return whole


def importable() -> bool:
    """Whether the package with its kernels can be imported from anywhere."""
    try:
        return importlib.util.find_spec("stellar_fast.kernels") is not None
    except ModuleNotFoundError:
        return False


def device_name() -> str | None:
    """Of the first CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit() -> str:
    """The commit measured; "-dirty" where the package or a benchmark differs from it.

    Raises:
        ValueError: git cannot tell.
    """
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(harness.ROOT), *arguments],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--", *SOURCES],
            )
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"git cannot tell the commit, give --commit: {error}") from error
    return head + ("-dirty" if changed else "")


def earlier(folders: Sequence[Path], facts: dict[str, Any]) -> Path | None:
    """The newest result file of the same device and commit; None for a commit that is dirty."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text())
            if content.get("name") == "gpu" and all(
                content.get(name) == facts[name] for name in ("device", "commit")
            ):
                last = content.get("runs") or [content]
                found.append(((last[-1]["date"], last[-1]["time"]), path))
    if not found or facts["commit"].endswith("-dirty"):
        return None
    return max(found)[1]


def _unused(folder: Path, stem: str) -> Path:
    """A path in `folder` that is not there yet."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def open_results(options: argparse.Namespace, device: str) -> Results:
    """The file that this run writes, with what an earlier one of the same code left.

    Raises:
        ValueError: git cannot tell the commit, or `--resume` names a file of another one.
    """
    now = datetime.datetime.now(datetime.UTC)
    facts = {
        "name": "gpu",
        "device": device,
        "date": now.date().isoformat(),
        "time": now.time().isoformat(timespec="seconds"),
        "commit": options.commit or commit(),
        "versions": harness.versions(),
        "command": "python -P benchmarks/gpu.py",
    }
    name = harness.folder_of(device)
    folder = (options.out or harness.RESULTS) / name
    source = options.resume
    if source is None and not options.fresh:
        source = earlier([folder, harness.RESULTS / name], facts)
    if source is None:
        return Results(_unused(folder, f"{facts['date']}-{facts['commit']}"), facts)
    path = folder / source.name
    if path.exists() and path.resolve() != source.resolve():
        path = _unused(folder, source.stem)
    return Results(path, facts, source)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument("--dry-run", action="store_true", help="list the parts and their bounds")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES)
    parser.add_argument("--out", type=Path, help="folder for the result file, not results/")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--resume", type=Path, help="a result file of this device and commit")
    source.add_argument("--fresh", action="store_true", help="repeat what was measured")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= MOST_MINUTES:
        parser.error(f"--minutes must be above 0 and at most {MOST_MINUTES:g}")
    parts = [part for part in PARTS if part.name in options.parts]
    if options.dry_run:
        print("\n".join(listing(parts, options.minutes)))
        return 0
    device = device_name()
    if device is None:
        print("no CUDA device on this machine; --dry-run lists what would run", file=sys.stderr)
        return 1
    if not importable():
        hint = "pip install --no-deps --no-build-isolation -e ."
        print(f"stellar_fast.kernels cannot be imported; {hint}", file=sys.stderr)
        return 1
    try:
        results = open_results(options, device)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"-> {results.path}", flush=True)
    return 0 if run(parts, results, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
