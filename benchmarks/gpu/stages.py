"""The stages of `gpu/run.py`, in a process of their own each, which adds lines to the result file.

    python -P benchmarks/gpu/stages.py STAGE FILE

Standard output is the file. A row that takes longer than its limit ends the process, and the end of
standard input, which is that of the command, ends it with all that it started.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

import torch
from gpu import encode, tune, waterfall
from gpu.run import FAILED, RESTART
from harness import ceilings
from harness.results import (
    COMPILED_BF16,
    EAGER_BF16,
    EAGER_FP32,
    ROOT,
    VIT_BF16,
    Result,
    Row,
    lines_of,
    read,
)  # fmt: skip
from harness.workloads import BATCHES, Case, cases
from peers import ops

from stellar_fast.config import MODELS

GOALS = (
    ("stellar-h16", (64, 1)),
    ("stellar-b16", (64, 1)),
    ("stellar-l16", (64,)),
)
# Against eager float32, which every model has a goal for.
SMALLER = (("stellar-b8", 8), ("stellar-b24", 8))
WITH_COMPILER = (("stellar-h16", 64), ("stellar-b16", 64), ("stellar-l16", 64), ("stellar-h16", 1))
SIDES = (224, 384, 512)
ORDER = ("stellar-h16", "stellar-b16", "stellar-l16", "stellar-b8", "stellar-b24")
COMPILE_LIMIT = 280


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


def environment() -> list[Row]:
    """Driver, memory and clocks as the machine has them."""
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=15,
        )
        driver = done.stdout.splitlines()[0] if done.returncode == 0 else done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        driver = str(error)
    return [
        {
            "name": "environment",
            "capability": f"{major}.{minor}",
            "free_bytes": free,
            "total_bytes": total,
            "cuda": torch.version.cuda,
            query: driver,
        }
    ]


def command(arguments: list[str]) -> list[Row]:
    """A row of a command of this repository: its last line, and what failed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    row: Row = {
        "name": arguments[0],
        "command": " ".join(["python", "-P", *arguments]),
        "summary": lines[-1] if lines else "",
        "exit": done.returncode,
        "seconds": time.perf_counter() - start,
    }
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        why = "\n".join(failed) or f"exit status {done.returncode}: {done.stderr[-2000:]}"
        row["failed"] = why[:4000]
    return [row]


def tests(mark: str, expression: str, *options: str) -> list[Row]:
    """The tests of a mark, the slow ones left out.

    Of the files that have any: others may need packages that a lent machine lacks.
    """
    files = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if f"mark.{mark}" in path.read_text()
    ]
    return command(["-m", "pytest", "-q", *options, "-m", f"{expression} and not slow", *files])


def audit() -> list[Row]:
    """The static audit of what this device runs."""
    from stellar_fast.kernels.launch import part_of_capability

    arch = part_of_capability(*torch.cuda.get_device_capability()).arch
    return command(["benchmarks/audit/run.py", "--arch", str(arch), "--quick"])


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def op(case: Case, compiles: bool) -> list[Row]:
    """A kernel beside its rivals; `compiles`: torch.compile among them, in a job of its own."""
    return ops.Race(case, torch.device("cuda"), compiles).run(seconds=1.0, least=10).rows()


def _ops(precisions: tuple[str, ...]) -> Iterator[Job]:
    for batch in (64, 1):
        for precision in precisions:
            for case in cases(MODELS["stellar-h16"], batch, precision):
                yield Job(case.key, lambda c=case: op(c, False), 40)
    for case in cases(MODELS["stellar-h16"], 64, precisions[0]):
        yield Job(f"{case.key}/compile", lambda c=case: op(c, True), 60)


def _encode(precisions: tuple[str, ...]) -> Iterator[Job]:
    for model, batches in GOALS:
        for precision in precisions:
            for batch in batches:
                against = [EAGER_FP32, EAGER_BF16] if precision == "bf16" else [EAGER_FP32]
                if model == "stellar-b16" and precision == "bf16":
                    against.append(VIT_BF16)

                def run(m=model, b=batch, p=precision, a=tuple(against)) -> list[Row]:
                    return encode.throughput(m, b, p, against=a, closely=True)

                yield Job(f"{model}/b{batch}/{precision}", run, 120)
    for model, batch in SMALLER:

        def small(m=model, b=batch) -> list[Row]:
            return encode.throughput(m, b, "bf16", against=(EAGER_FP32,))

        yield Job(f"{model}/b{batch}/bf16", small)


def _compile(precisions: tuple[str, ...]) -> Iterator[Job]:
    for model, batch in WITH_COMPILER:
        outlasted = {
            "name": COMPILED_BF16,
            "model": model,
            "batch": batch,
            "not_run": f"did not finish within {COMPILE_LIMIT} s, our own load included",
        }

        def run(m=model, b=batch) -> list[Row]:
            return encode.compiled(m, b, precisions)

        yield Job(f"{model}/b{batch}/compile", run, COMPILE_LIMIT, outlasted)


def _sweep(precisions: tuple[str, ...]) -> Iterator[Job]:
    groups = [(p, ORDER[:3]) for p in precisions]
    groups += [(p, ORDER[3:]) for p in precisions]
    groups += [("fp16", ORDER), ("fp32", ORDER)]
    for precision, models in groups:
        for model in models:
            for batch in BATCHES:
                against = (EAGER_FP32, EAGER_BF16) if batch in (8, 64) else ()

                def run(m=model, b=batch, p=precision, a=against) -> list[Row]:
                    a = a if p == "bf16" else ()
                    return encode.throughput(m, b, p, against=a, seconds=1.0, least=4)

                yield Job(f"{model}/b{batch}/{precision}", run)


def _curves(precisions: tuple[str, ...]) -> Iterator[Job]:
    points = [("stellar-b16", 64, side) for side in SIDES]
    points += [(model, 64, 224) for model in ("stellar-b8", "stellar-b24")]
    points += [("stellar-h16", 16, side) for side in SIDES]
    for precision in precisions:
        for model, batch, side in points:

            def run(m=model, b=batch, p=precision, s=side) -> list[Row]:
                return encode.throughput(m, b, p, side=s, seconds=1.0)

            yield Job(f"{model}/b{batch}/{precision}/{side}", run)


def jobs(stage: str) -> Iterator[Job]:
    """The rows of a stage by their keys, most important first."""
    quick = ("bf16", "fp8") if has_fp8() else ("bf16",)
    match stage:
        case "environment":
            yield Job("environment", environment, 30)
        case "tests":
            yield Job("tests", lambda: tests("gpu", "gpu"), 145)
        case "kernels":
            # Most of their time is compilation, on the CPU's cores.
            yield Job("kernels", lambda: tests("kernels", "kernels and not gpu", "-n", "8"), 235)
        case "audit":
            yield Job("audit", audit, 95)
        case "ceilings":
            for name in ("bf16", "copy", *quick[1:], "fp16"):
                yield Job(name, lambda n=name: [ceilings.measure(n, torch.device("cuda"))], 25)
        case "encode":
            yield from _encode(quick)
        case "compile":
            yield from _compile(quick)
        case "ops":
            yield from _ops(quick)
        case "tune":
            for key, run, limit in tune.jobs(quick):
                yield Job(key, run, limit)
        case "waterfall":
            for key, run in waterfall.jobs(quick):
                yield Job(key, run)
        case "sweep":
            yield from _sweep(quick)
        case "curves":
            yield from _curves(quick)
        case _:
            raise ValueError(f"unknown stage {stage!r}")


def lost() -> bool:
    """Whether an error has made the device useless to this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def work(
    stage: str,
    earlier: Result,
    write: Callable[[Any], object],
    is_lost: Callable[[], bool] = lost,
) -> int:
    """Every job of `stage` that has no figure yet: the exit status.

    What this run has tried already is left out; `write` gets the lines of the file.
    """
    status, known = 0, ceilings.rates(earlier.rows("ceilings"))
    for item in jobs(stage):
        job = Job(*item)
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
            rows = [{"name": "engine", "failed": "the CUDA context was lost in this row"}]
        write([ceilings.with_floor({**row, **place}, known) for row in rows])
        if gone:
            return RESTART
        if any("failed" in row for row in rows):
            status = FAILED
    return status


def end_with_the_command() -> None:
    """Ends this process and all that it started when standard input ends."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no row
    threading.Thread(target=end_with_the_command, daemon=True).start()
    stage, path = sys.argv[1:]
    return work(stage, read(Path(path)), lambda line: os.write(out, lines_of([line])))


if __name__ == "__main__":
    sys.exit(main())
