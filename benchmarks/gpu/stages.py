"""The stages of `gpu/run.py`: what is asked in each, most important first. See `worker.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

import torch
from gpu import encode, tune, waterfall, worker
from gpu.worker import Job
from harness import ceilings
from harness.results import COMPILED_BF16, EAGER_BF16, EAGER_FP32, ROOT, VIT_BF16, Row  # fmt: skip
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
# Beside torch.compile: what has a goal, and the others.
WITH_COMPILER = {
    "compile": [("stellar-h16", 64)],
    "compilers": [("stellar-b16", 64), ("stellar-l16", 64), ("stellar-h16", 1)],
}
SIDES = (224, 384, 512)
ORDER = ("stellar-h16", "stellar-b16", "stellar-l16", "stellar-b8", "stellar-b24")
COMPILE_LIMIT = 280
# Half a minute of tests: the published outputs, batches, graphs, streams. Every row of "encode"
# is held to float64 besides.
SMOKE = [
    f"{path.relative_to(ROOT)}::{name}"
    for path in (ROOT / "tests").rglob("test_gpu_kernels.py")
    for name in (
        "test_encode_meets_the_published_outputs[encode-tiny16]",
        "test_encode_meets_the_published_outputs[encode-tiny14-k8]",
        "test_fp8_error_budget[encode-b16-True]",
        "test_an_image_does_not_see_its_batch[bf16]",
        "test_an_image_does_not_see_its_batch[fp8]",
        "test_graphs_give_what_launches_give[bf16]",
        "test_graphs_give_what_launches_give[fp8]",
        "test_work_is_ordered_on_the_callers_stream",
        "test_a_caller_captures_encode_in_a_graph_of_his_own",
    )
]


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


def architecture() -> int:
    from stellar_fast.kernels.gpus import gpu_of_capability

    return gpu_of_capability(*torch.cuda.get_device_capability()).arch


def audit() -> list[Row]:
    """The static audit of what this device runs."""
    return command(["benchmarks/audit/run.py", "--arch", str(architecture()), "--quick"])


def warm(precisions: tuple[str, ...]) -> list[Row]:
    """Compiles what the goals launch, on all cores; it lies in Triton's cache from then on."""
    from audit import run as static

    arch, start = architecture(), time.perf_counter()
    needed: dict[Any, None] = {}
    for model, batches in GOALS:
        for precision, batch in product(precisions, batches):
            for item in static.forward(MODELS[model], precision, batch, arch):
                needed[static.compilation(item, arch)] = None
    findings = static.audit(list(needed), os.cpu_count() or 1)
    faults = [fault for finding in findings for fault in finding.faults]
    row: Row = {
        "name": "kernels compiled",
        "count": len(findings),
        "seconds": time.perf_counter() - start,
        "workers": os.cpu_count(),
    }
    return [row | ({"failed": "; ".join(faults)[:4000]} if faults else {})]


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def op(case: Case, compiles: bool) -> list[Row]:
    """A kernel beside its rivals; `compiles`: torch.compile among them, in a job of its own."""
    return ops.Race(case, torch.device("cuda"), compiles).run(seconds=1.0, least=10).rows()


def ceiling(name: str) -> list[Row]:
    return [ceilings.measure(name, torch.device("cuda"))]


def throughput(model: str, batch: int, precision: str, limit: float = 90.0, **options: Any) -> Job:
    """The engine end to end, and its rivals."""
    run = partial(encode.throughput, model, batch, precision, **options)
    return Job(f"{model}/b{batch}/{precision}", run, limit)


def _ops(precisions: tuple[str, ...]) -> Iterator[Job]:
    for batch in (64, 1):
        for precision in precisions:
            for case in cases(MODELS["stellar-h16"], batch, precision):
                yield Job(case.key, partial(op, case, False), 40)
    for case in cases(MODELS["stellar-h16"], 64, precisions[0]):
        yield Job(f"{case.key}/compile", partial(op, case, True), 60)


def _encode(precisions: tuple[str, ...]) -> Iterator[Job]:
    for model, batches in GOALS:
        for precision, batch in product(precisions, batches):
            against = [EAGER_FP32, EAGER_BF16] if precision == "bf16" else [EAGER_FP32]
            if model == "stellar-b16" and precision == "bf16":
                against.append(VIT_BF16)
            yield throughput(model, batch, precision, 120, against=against, closely=True)
    for model, batch in SMALLER:
        yield throughput(model, batch, "bf16", against=[EAGER_FP32])


def _compile(precisions: tuple[str, ...], stage: str) -> Iterator[Job]:
    for model, batch in WITH_COMPILER[stage]:
        why = f"did not finish within {COMPILE_LIMIT} s, our own load included"
        late = {"name": COMPILED_BF16, "model": model, "batch": batch, "not_run": why}
        run = partial(encode.compiled, model, batch, precisions)
        yield Job(f"{model}/b{batch}/compile", run, COMPILE_LIMIT, late)


def _sweep(precisions: tuple[str, ...]) -> Iterator[Job]:
    groups = [(p, ORDER[:3]) for p in precisions] + [(p, ORDER[3:]) for p in precisions]
    for precision, models in [*groups, ("fp16", ORDER), ("fp32", ORDER)]:
        for model, batch in product(models, BATCHES):
            rivals = precision == "bf16" and batch in (8, 64)
            against = [EAGER_FP32, EAGER_BF16] if rivals else []
            yield throughput(model, batch, precision, against=against, seconds=1.0, least=4)


def _curves(precisions: tuple[str, ...]) -> Iterator[Job]:
    points = [("stellar-b16", 64, side) for side in SIDES]
    points += [(model, 64, 224) for model in ("stellar-b8", "stellar-b24")]
    points += [("stellar-h16", 16, side) for side in SIDES]
    for precision, (model, batch, side) in product(precisions, points):
        job = throughput(model, batch, precision, side=side, seconds=1.0)
        yield job._replace(key=f"{job.key}/{side}")


def jobs(stage: str) -> Iterator[Job]:
    """The rows of a stage by their keys, most important first."""
    quick = ("bf16", "fp8") if has_fp8() else ("bf16",)
    match stage:
        case "environment":
            yield Job("environment", environment, 30)
        case "warm":
            yield Job("warm", partial(warm, quick), 110)
        case "smoke":
            yield Job("smoke", partial(command, ["-m", "pytest", "-q", *SMOKE]), 110)
        case "tests":
            yield Job("tests", partial(tests, "gpu", "gpu", "-n", "8"), 235)
        case "kernels":
            # Most of their time is compilation, on the CPU's cores.
            run = partial(tests, "kernels", "kernels and not gpu", "-n", "8")
            yield Job("kernels", run, 235)
        case "audit":
            yield Job("audit", audit, 95)
        case "ceilings":
            for name in ("bf16", "copy", *quick[1:], "fp16"):
                yield Job(name, partial(ceiling, name), 25)
        case "tune" | "waterfall":
            for item in {"tune": tune, "waterfall": waterfall}[stage].jobs(quick):
                yield Job(*item)
        case "compile" | "compilers":
            yield from _compile(quick, stage)
        case _:
            ways = {"encode": _encode, "ops": _ops, "sweep": _sweep, "curves": _curves}
            yield from ways[stage](quick)


def lost() -> bool:
    """Whether an error has made the device useless to this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(worker.main(jobs, lost))
