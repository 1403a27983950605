"""The parts of `gpu.py`, each in a process of its own: rows as JSON lines on standard output."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import ceilings
import op_race
import torch
from cases import BATCHES, cases, flops_per_image
from gpu_timing import time_in_turn
from harness import within_budget
from stellar_fast.reference import ops as oracles
from stellar_fast.reference.model import STELLARModel
from torch import Tensor

import stellar_fast
from stellar_fast import encoder
from stellar_fast.config import MODELS
from stellar_fast.encoder import OUTPUTS
from stellar_fast.loading import SYNTHETIC_SEED
from stellar_fast.names import encode_shapes
from stellar_fast.synthetic import synthetic_state

Job = tuple[str, Callable[[], dict[str, Any]]]
GOALS = (
    ("stellar-h16", 64),
    ("stellar-l16", 64),
    ("stellar-b16", 64),
    ("stellar-h16", 1),
    ("stellar-b16", 1),
)
CHECKED = 4  # images on which the error budget is held


def reference(model: str) -> STELLARModel:
    """The published model in plain PyTorch, float32 on the device, with the engine's weights."""
    config = MODELS[model]
    plain = STELLARModel(
        num_sparse_tokens=config.num_sparse_tokens,
        spatial_temp=config.spatial_temp,
        vit_pretrained=config.backbone,
        do_recon=False,
        do_clustering=False,
    )
    state = dict(synthetic_state(encode_shapes(config), SYNTHETIC_SEED))
    plain.load_state_dict(state, strict=False)
    return plain.eval().cuda()


def refusal(engine: stellar_fast.Engine, images: Tensor) -> str | None:
    """Why the engine gets no figure; plain PyTorch computes with the engine's own weights."""
    grid = engine.config.backbone.grid
    with torch.no_grad():
        exact = reference(engine.config.name).double().encode(images.double() / 255)
        weights = engine._encoder
        plain = encoder.encode(
            oracles,
            weights,
            engine.config,
            images,
            weights.table.table(grid, grid),
            OUTPUTS,
            torch.float32,
        )
    try:
        within_budget(engine.encode(images), plain, exact)
    except AssertionError as error:
        return str(error)
    return None


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


def tests() -> dict[str, Any]:
    """The tests that need a device, the slow ones left out."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu and not slow", "tests"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    lines = done.stdout.splitlines()
    row = {"summary": lines[-1] if lines else "", "seconds": time.perf_counter() - start}
    if done.returncode:
        row["failed"] = "\n".join(line for line in lines if line.startswith("FAILED"))[:4000]
        row["failed"] = row["failed"] or f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return row


def throughput(model: str, batch: int, precision: str, seconds: float = 2.0) -> dict[str, Any]:
    """Images a second of the engine and of the eager reference, in turn; memory; latency."""
    start = time.perf_counter()
    engine = stellar_fast.load(
        model, weights="synthetic", device="cuda", precision=precision, max_batch=batch
    )
    row: dict[str, Any] = {"backend": engine.backend, "load_seconds": time.perf_counter() - start}
    sets = [
        torch.randint(0, 256, (batch, 3, 224, 224), device="cuda", dtype=torch.uint8)
        for _ in range(4)
    ]
    reason = refusal(engine, sets[0][:CHECKED])
    if reason is not None:
        return {**row, "refused": reason}
    start = time.perf_counter()
    engine.encode(sets[0])
    torch.cuda.synchronize()
    row["capture_seconds"] = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    engine.encode(sets[0])
    torch.cuda.synchronize()
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    plain = reference(model)
    half = reference(model).bfloat16()
    calls = {
        "engine": [lambda x=x: engine.encode(x, check_range=False) for x in sets],
        "eager_fp32": [lambda x=x: plain.encode(x.float() / 255) for x in sets],
        "eager_bf16": [lambda x=x: half.encode(x.bfloat16() / 255) for x in sets],
    }
    with torch.no_grad():
        timings = time_in_turn(calls, seconds=seconds, least=5)
    for name, timing in timings.items():
        row[name] = {
            "median": timing.median,
            "low": timing.low,
            "high": timing.high,
            "images_per_second": batch / timing.median,
        }
    row["tflops"] = flops_per_image(MODELS[model]) * batch / timings["engine"].median / 1e12
    if batch == 1:
        taken = []
        for i in range(1000):
            begin = time.perf_counter()
            engine.encode(sets[i % 4], check_range=False)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
        row["latency_median"] = statistics.median(taken)
        row["latency_p99"] = statistics.quantiles(taken, n=100)[98]
    return row


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def jobs(part: str) -> Iterator[Job]:
    """The rows of a part by their keys, most important first."""
    quick = ("bf16", "fp8") if has_fp8() else ("bf16",)
    match part:
        case "environment":
            yield "environment", environment
        case "tests":
            yield "tests", tests
        case "ops":
            for precision in quick:
                for case in cases(MODELS["stellar-h16"], 64, precision):
                    yield case.key, lambda case=case: op_race.measure(case, 1.0, compiles=True)
        case "ceilings":
            for name in ("bf16", "copy", "fp16", *quick[1:]):
                yield name, lambda name=name: ceilings.measure(name)
        case "encode" | "sweep":
            precisions = quick if part == "encode" else (*quick, "fp16", "fp32")
            points = GOALS if part == "encode" else [(m, b) for b in BATCHES for m in MODELS]
            for model, batch in points:
                for precision in precisions:
                    yield (
                        f"{model}/b{batch}/{precision}",
                        lambda m=model, b=batch, p=precision: throughput(m, b, p),
                    )
        case _:
            raise ValueError(f"unknown part {part!r}")


def work(part: str, done: set[str], write: Callable[[dict[str, Any]], None]) -> bool:
    """Every row of `part` that is not in `done`; whether none failed."""
    whole = True
    for key, job in jobs(part):
        if key in done:
            continue
        try:
            row = {"key": key, **job()}
        except Exception as error:
            row = {"key": key, "failed": f"{type(error).__name__}: {error}"[:2000]}
        whole &= "failed" not in row
        write(row)
    return whole


def main() -> int:
    done = set(json.load(sys.stdin))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no row
    whole = work(sys.argv[1], done, lambda row: print(json.dumps(row), file=out, flush=True))
    if whole:
        print(json.dumps({"key": "finished"}), file=out, flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
