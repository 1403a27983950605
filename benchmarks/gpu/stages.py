"""The parts of `gpu.py`, in a process of their own each: rows as JSON lines on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import ceilings
import gpu_encode
import gpu_waterfall
import op_race
import op_rivals
import torch
import tune
from cases import BATCHES, Case, cases
from gpu_run import RESTART

from stellar_fast.config import MODELS

ROOT = Path(__file__).parent.parent
GOALS = (
    ("stellar-h16", (64, 1)),
    ("stellar-b16", (64, 1)),
    ("stellar-l16", (64,)),
)
# Against eager float32, which every model has a goal for.
SMALLER = (("stellar-b8", 8), ("stellar-b24", 8))
COMPILED = (("stellar-h16", 64), ("stellar-b16", 64), ("stellar-l16", 64), ("stellar-h16", 1))
SIDES = (224, 384, 512)
ORDER = ("stellar-h16", "stellar-b16", "stellar-l16", "stellar-b8", "stellar-b24")
COMPILE_LIMIT = 280


class Job(NamedTuple):
    """A row to be measured.

    Attributes:
        limit: seconds after which the process is ended.
        outlasted: the row's fields in that case; a failure if None.
    """

    key: str
    run: Callable[[], dict[str, Any]]
    limit: float = 90.0
    outlasted: dict[str, Any] | None = None


def environment() -> dict[str, Any]:
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
    return {
        "capability": f"{major}.{minor}",
        "free_bytes": free,
        "total_bytes": total,
        "cuda": torch.version.cuda,
        query: driver,
    }


def command(arguments: list[str]) -> dict[str, Any]:
    """A row of a command of this repository: its last line, and what failed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    row: dict[str, Any] = {
        "command": " ".join(["python", "-P", *arguments]),
        "summary": lines[-1] if lines else "",
        "exit": done.returncode,
        "seconds": time.perf_counter() - start,
    }
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        why = "\n".join(failed) or f"exit status {done.returncode}: {done.stderr[-2000:]}"
        row["failed"] = why[:4000]
    return row


def tests(mark: str, expression: str, *options: str) -> dict[str, Any]:
    """The tests of a mark, the slow ones left out.

    Of the files that have any: others may need packages that a lent machine lacks.
    """
    files = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if f"mark.{mark}" in path.read_text()
    ]
    return command(["-m", "pytest", "-q", *options, "-m", f"{expression} and not slow", *files])


def audit() -> dict[str, Any]:
    """The static audit of what this device runs."""
    from stellar_fast.kernels.launch import part_of_capability

    arch = part_of_capability(*torch.cuda.get_device_capability()).arch
    return command(["benchmarks/audit.py", "--arch", str(arch), "--quick"])


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def op(case: Case, compiles: bool) -> dict[str, Any]:
    """A kernel beside its rivals; `compiles`: torch.compile among them, in a row of its own."""
    row = op_race.measure(case, 1.0, compiles=compiles)
    if not compiles:
        return row
    return {**row, "compile_mode": op_rivals.COMPILE_MODE}


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
                against = ["eager_fp32", "eager_bf16"] if precision == "bf16" else ["eager_fp32"]
                if model == "stellar-b16" and precision == "bf16":
                    against.append("vit_bf16")

                def run(m=model, b=batch, p=precision, a=tuple(against)) -> dict[str, Any]:
                    return gpu_encode.throughput(m, b, p, against=a, closely=True)

                yield Job(f"{model}/b{batch}/{precision}", run, 120)
    for model, batch in SMALLER:

        def small(m=model, b=batch) -> dict[str, Any]:
            return gpu_encode.throughput(m, b, "bf16", against=("eager_fp32",))

        yield Job(f"{model}/b{batch}/bf16", small)


def _compile(precisions: tuple[str, ...]) -> Iterator[Job]:
    for model, batch in COMPILED:
        why = f"did not finish within {COMPILE_LIMIT} s, our own load included"
        outlasted = {
            "model": model,
            "batch": batch,
            "compile_mode": gpu_encode.COMPILE_MODE,
            "not_run": {"compile": why},
        }

        def run(m=model, b=batch) -> dict[str, Any]:
            return gpu_encode.compiled(m, b, precisions)

        yield Job(f"{model}/b{batch}/compile", run, COMPILE_LIMIT, outlasted)


def _sweep(precisions: tuple[str, ...]) -> Iterator[Job]:
    groups = [(p, ORDER[:3]) for p in precisions]
    groups += [(p, ORDER[3:]) for p in precisions]
    groups += [("fp16", ORDER), ("fp32", ORDER)]
    for precision, models in groups:
        for model in models:
            for batch in BATCHES:
                against = ("eager_fp32", "eager_bf16") if batch in (8, 64) else ()

                def run(m=model, b=batch, p=precision, a=against) -> dict[str, Any]:
                    a = a if p == "bf16" else ()
                    return gpu_encode.throughput(m, b, p, against=a, seconds=1.0, least=4)

                yield Job(f"{model}/b{batch}/{precision}", run)


def _curves(precisions: tuple[str, ...]) -> Iterator[Job]:
    points = [("stellar-b16", 64, side) for side in SIDES]
    points += [(model, 64, 224) for model in ("stellar-b8", "stellar-b24")]
    points += [("stellar-h16", 16, side) for side in SIDES]
    for precision in precisions:
        for model, batch, side in points:

            def run(m=model, b=batch, p=precision, s=side) -> dict[str, Any]:
                return gpu_encode.throughput(m, b, p, side=s, seconds=1.0)

            yield Job(f"{model}/b{batch}/{precision}/{side}", run)


def jobs(part: str) -> Iterator[Job]:
    """The rows of a part by their keys, most important first."""
    quick = ("bf16", "fp8") if has_fp8() else ("bf16",)
    match part:
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
                yield Job(name, lambda name=name: ceilings.measure(name), 25)
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
            for key, run in gpu_waterfall.jobs(quick):
                yield Job(key, run)
        case "sweep":
            yield from _sweep(quick)
        case "curves":
            yield from _curves(quick)
        case _:
            raise ValueError(f"unknown part {part!r}")


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
    part: str,
    done: set[str],
    write: Callable[[dict[str, Any]], None],
    is_lost: Callable[[], bool] = lost,
) -> int:
    """Every row of `part` that is not in `done`: 0, 1 where one failed, or RESTART.

    `write` gets a line before each row, which says how long it may take, and the row.
    """
    status = 0
    for item in jobs(part):
        job = Job(*item)
        if job.key in done:
            continue
        begin: dict[str, Any] = {"begin": job.key, "limit": job.limit}
        write(begin if job.outlasted is None else {**begin, "outlasted": job.outlasted})
        try:
            row = {**job.run(), "key": job.key}
        except Exception as error:
            row = {"key": job.key, "failed": f"{type(error).__name__}: {error}"[:2000]}
        gone = is_lost()
        if gone and "failed" not in row:
            row = {"key": job.key, "failed": "the CUDA context was lost in this row"}
        status |= "failed" in row
        write(row)
        if gone:
            return RESTART
    return status


def main() -> int:
    done = set(json.load(sys.stdin))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no row
    status = work(sys.argv[1], done, lambda row: print(json.dumps(row), file=out, flush=True))
    if status == 0:
        print(json.dumps({"key": "finished"}), file=out, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
