"""Result files: how every figure is kept, and the one reader of them.

A file is JSON Lines. An object is what holds of the rows below it: device, date, commit, versions,
command; each run that wrote into the file begins with one. An array is the rows of one job, whole
or not there. `{"begin": KEY}` says that a job was started, `{"finished": STAGE}` that all of a
stage have figures: a job that was begun and has no rows ended with its process.

A row is one implementation of one thing:

    stage        encode, ops, ceilings, latency, footprint, compile, waterfall, …
    key          the job: model/bBATCH/precision/…; a job that is repeated replaces its rows
    name         the implementation; ours begin with "engine" or "kernel"
    model, batch, precision, op
    median, low, high, rounds    seconds: median and quartiles, of how many rounds
    refused, failed, not_run     or why there is no figure
    …            what else was found: errors, flops, floor, peak_bytes, …

The rows are plain dictionaries: a dozen small tables of texts made of several fields each would get
no shorter with a data frame.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "openvino", "nncf", "onnxruntime", "transformers", "triton")
SOURCES = ("stellar_fast", "kernels", "reference", "benchmarks")
# Rivals by the names that their rows have.
EAGER_FP32, EAGER_BF16 = "reference fp32 eager", "reference bf16 eager"
VIT_BF16 = "transformers ViTModel bf16 (backbone only)"
COMPILED_BF16 = "torch.compile max-autotune bf16"
BASELINES = {"encode": EAGER_FP32, "ops": "eager"}  # what speed-ups are over
PROBLEMS = ("refused", "failed", "not_run")
Row = dict[str, Any]


@dataclass
class Result:
    """What a result file holds.

    Attributes:
        facts: of the first run that wrote into it.
        runs: the facts of each.
        jobs: rows by stage and key.
        begun: the job that was started last and has no rows, as it was announced.
        tried: stages and keys that the last run has begun.
        finished: stages all of whose rows have figures.
    """

    path: Path
    runs: list[Row] = field(default_factory=list)
    jobs: dict[tuple[str, str], list[Row]] = field(default_factory=dict)
    begun: Row | None = None
    tried: set[tuple[str, str]] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)

    @property
    def facts(self) -> Row:
        return self.runs[0]

    @property
    def when(self) -> tuple[str, str]:
        return self.runs[-1]["date"], self.runs[-1].get("time", "")

    def rows(self, stage: str, **equal: Any) -> list[Row]:
        """The rows of a stage in which these fields have these values."""
        return [
            row
            for (of, _), rows in self.jobs.items()
            for row in rows
            if of == stage and all(row.get(name) == value for name, value in equal.items())
        ]

    def has(self, stage: str, key: str) -> bool:
        """Whether a job needs no second run: a failure does."""
        rows = self.jobs.get((stage, key))
        return rows is not None and not any("failed" in row for row in rows)

    def take(self, line: Any) -> None:
        """One line of the file."""
        if isinstance(line, list):
            self.jobs[line[0]["stage"], line[0]["key"]] = line
            self.begun = None
        elif "begin" in line:
            job = line["stage"], line["begin"]
            self.begun = line
            self.tried.add(job)
            self.jobs[job] = [ended(line, "its process ended in this row")]
        elif "finished" in line:
            self.finished.add(line["finished"])
        else:
            self.runs.append(line)
            self.tried, self.begun = set(), None


def ended(begin: Row, why: str) -> Row:
    """The row of a job that came to nothing."""
    return {"stage": begin["stage"], "key": begin["begin"], "name": "engine", "failed": why}


def read(path: Path) -> Result:
    """A result file; a last line that was being written when its process ended is left out.

    Raises:
        ValueError: it is no result file.
    """
    result = Result(path)
    text = path.read_text()
    try:
        for line in text[: text.rfind("\n") + 1].splitlines():
            result.take(json.loads(line))
        if not {"name", "date", "commit"} <= set(result.facts):
            raise KeyError("name, date or commit")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is no result file: {type(error).__name__}: {error}") from error
    return result


def found(name: str, folder: str = "*") -> list[Result]:
    """The result files of one benchmark, the newest first."""
    every = (read(path) for path in sorted(RESULTS.glob(f"{folder}/*.jsonl")))
    return sorted(
        (result for result in every if result.facts["name"] == name),
        key=lambda result: (result.when, result.path),
        reverse=True,
    )


def kind(result: Result) -> tuple:
    """What tells one kind of machine from another."""
    processor = result.facts.get("processor", {})
    names = ("name", "family", "model", "threads", "cores")
    return (result.facts.get("device"), *(processor.get(name) for name in names))


def newest_of_each_kind(name: str) -> list[Result]:
    """The newest result of a benchmark for each kind of machine, the newest of all first."""
    kinds: dict[tuple, Result] = {}
    for result in found(name):
        kinds.setdefault(kind(result), result)
    return list(kinds.values())


def with_older(results: list[Result]) -> Result | None:
    """The newest of a kind of results, and of the same device what it has no figure for.

    Rows of older files have `of_commit`, theirs.
    """
    if not results:
        return None
    first = results[0]
    jobs = dict(first.jobs)
    for older in results[1:]:
        if kind(older) != kind(first):
            continue
        for job, rows in older.jobs.items():
            if any(map(problem, jobs.get(job, [{"not_run": ""}]))) and not any(map(problem, rows)):
                commit = older.facts["commit"]
                jobs[job] = [{"of_commit": commit, **row} for row in rows]
    return dataclasses.replace(first, jobs=jobs)


def is_ours(row: Row) -> bool:
    return row["name"].startswith(("engine", "kernel"))


def problem(row: Row) -> str:
    """Why a row has no figure, in one line; empty if it has."""
    for name in PROBLEMS:
        if name in row:
            return f"{name.replace('_', ' ')}: {(row[name].splitlines() or [''])[0]}"
    return ""


def processor() -> Row:
    """What the CPU calls itself and the instruction sets that decide bf16 speed."""
    import torch  # reading results needs none

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


def sources() -> str:
    """A hash of all code that a figure depends on, this folder included."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix == ".py" or path.parent.name == "tuned":
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit measured, "-dirty" where the code differs from it; without git, the sources'."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = [*(f"{folder}/*.py" for folder in SOURCES), "kernels/tuned"]
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"sources-{sources()}"


def folder_of(device: str) -> str:
    """The folder under `results` for a device of this name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def facts(name: str, command: str, **others: Any) -> Row:
    """The first line of a run."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "name": name,
        "date": now.date().isoformat(),
        "time": now.time().isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources(),
        "versions": versions(),
        "command": command,
        **others,
    }


def jobs_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows as a file has them: those of a job together."""
    jobs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        jobs.setdefault((row["stage"], row["key"]), []).append(row)
    return list(jobs.values())


def write(folder: str, header: Row, rows: Iterable[Row]) -> Path:
    """Writes `results/FOLDER/DATE-COMMIT-NAME.jsonl`, whole or not at all, and returns its path."""
    path = RESULTS / folder / f"{header['date']}-{header['commit']}-{header['name']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".unfinished")
    try:
        beside.write_bytes(lines_of([header, *jobs_of(rows)]))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # of a run that was interrupted
    return path


def going_on(folder: Path, header: Row, resume: Path | None = None, fresh: bool = False) -> Path:
    """The file in `folder` that a run on this device adds to.

    The newest file of the same device and sources goes on, wherever it lies; `resume` names
    another. It is copied into `folder` where that is not its own.

    Raises:
        ValueError: `resume` was measured on another device or from other sources.
    """
    same = ("name", "device", "sources")
    places = {folder.resolve(), (RESULTS / folder.name).resolve()}
    earlier = [read(path) for place in places for path in place.glob("*.jsonl")]
    if resume is not None:
        earlier = [read(resume)]
        for name in same:
            if earlier[0].facts.get(name) != header[name]:
                raise ValueError(
                    f"{resume} was measured with {name} {earlier[0].facts.get(name)!r}, this is "
                    f"{header[name]!r}: leave out --resume"
                )
    fitting = [r for r in earlier if not fresh and all(r.facts.get(n) == header[n] for n in same)]
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{header['date']}-{header['commit']}", 2
    if not fitting:
        path = folder / f"{stem}.jsonl"
        while path.exists():
            path, number = folder / f"{stem}-{number}.jsonl", number + 1
        return path
    found = max(fitting, key=lambda result: (result.when, len(result.jobs)))
    path = folder / found.path.name
    if path.resolve() != found.path.resolve():
        shutil.copyfile(found.path, path)
    return path


@contextlib.contextmanager
def adding_to(path: Path, header: Row) -> Iterator[BinaryIO]:
    """A result file open for a run's lines, behind its last whole one; nobody else may add.

    Raises:
        BlockingIOError: another run, or a process of one, is adding to it.
    """
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another run is adding to {path}; wait for its end") from error
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(lines_of([header]))
        yield file


def lines_of(items: Iterable[Any]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()
