"""`encode` end to end on a GPU: ours beside plain PyTorch, its compiler, and transformers' ViT.

Rows of the parts "encode", "compile", "sweep" and "curves".
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from gpu_energy import EnergyMeter, joules_per_call
from gpu_subjects import (
    COMPILE_MODE,
    DEVICE,
    SETS,
    SIDE,
    Loaded,
    Maker,
    Row,
    compiled_calls,
    encode_calls,
    engines,
    facts,
    inputs,
    load,
    reference,
    refusal,
    rivals,
)
from gpu_timing import Call, first_line, time_in_turn
from torch import Tensor

import stellar_fast

LATENCY_CALLS = 1000
COMPILE_SECONDS = 3.0  # of timing beside the compiler
ENERGY_SECONDS = 2.0  # NVML's counter steps every 20 to 100 ms


def in_turn(
    ours: Mapping[str, list[Call]], makers: Mapping[str, Maker], batch: int, **options: Any
) -> Row:
    """Fields of a row: the time of each, or `not_run` with the reason of a rival.

    Raises:
        RuntimeError: ours failed.
    """
    not_run: dict[str, str] = {}
    calls = dict(ours)
    for name, make in makers.items():
        try:
            calls[name] = make()
        except Exception as error:
            torch.cuda.synchronize()  # raises where the device is lost
            not_run[name] = first_line(error)
    with torch.no_grad():
        timings = time_in_turn(calls, not_run=not_run, **options)
    for name in ours:
        if name in not_run:
            raise RuntimeError(f"{name}: {not_run[name]}")
    row: Row = {
        name: {
            "median": timing.median,
            "low": timing.low,
            "high": timing.high,
            "rounds": timing.rounds,
            "images_per_second": batch / timing.median,
        }
        for name, timing in timings.items()
    }
    return {**row, "not_run": not_run} if not_run else row


def latency(call: Callable[[int], object], calls: int) -> Row:
    """Host seconds of single calls, each waited for."""
    taken = []
    for index in range(calls):
        begin = time.perf_counter()
        call(index)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return {
        "latency_median": statistics.median(taken),
        "latency_p99": statistics.quantiles(taken, n=100)[98],
        "latency_calls": calls,
    }


def energy(call: Call, batch: int) -> Row:
    """Joules an image, or why the driver does not report them."""
    try:
        meter = EnergyMeter(str(torch.cuda.get_device_properties(DEVICE).uuid))
    except (OSError, AttributeError) as error:  # no NVML, or an older one without the function
        return {"energy": f"not reported: {error}"}
    joules = joules_per_call(meter, call, torch.cuda.synchronize, ENERGY_SECONDS)
    return {"joules_per_image": joules / batch}


def captures(engine: stellar_fast.Engine) -> bool:
    """Whether its batches run as CUDA graphs; one that fails to capture goes on without."""
    return engine._graphs is not None and not engine._graphs._failed


def _first(loaded: Loaded, images: Tensor) -> Row:
    """The first call, which compiles and captures, and the peak of memory that it needs."""
    engine = loaded.engine
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - loaded.size
    start = time.perf_counter()
    engine.encode(images, check_range=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "load_seconds": loaded.seconds,
        "first_call_seconds": seconds,
        "cuda_graphs": captures(engine),
        "peak_bytes": torch.cuda.max_memory_allocated() - others,
    }


def throughput(
    model: str,
    batch: int,
    precision: str,
    *,
    side: int = SIDE,
    against: Collection[str] = (),
    seconds: float = 2.0,
    least: int = 5,
    closely: bool = False,
) -> Row:
    """Images a second of the engine and its rivals in turn; `closely`: latency and energy too."""
    loaded: Loaded = engines(model, precision)
    engine, sets = loaded.engine, inputs(batch, side)
    row = facts(model, batch, precision, side, engine) | _first(loaded, sets[0])
    reason = refusal(engine, sets[0])
    if reason is not None:
        return {**row, "refused": reason}
    calls = encode_calls(engine, sets)
    makers = rivals(model, sets, against)
    row |= in_turn({"engine": calls}, makers, batch, seconds=seconds, least=least)
    row["tflops"] = row["flops"] / row["engine"]["median"] / 1e12
    if closely:
        row |= energy(calls[0], batch)
        if batch == 1:
            row |= latency(lambda index: calls[index % SETS](), LATENCY_CALLS)
    return row


def compiled(model: str, batch: int, precisions: Collection[str]) -> Row:
    """The engine in `precisions` and torch.compile of the reference in bf16, in turn."""
    sets = inputs(batch)
    row: Row = {"model": model, "batch": batch, "compile_mode": COMPILE_MODE}
    ours: dict[str, list[Call]] = {}
    for precision in precisions:
        engine = load(model, precision).engine  # both are needed at once
        reason = refusal(engine, sets[0])
        if reason is not None:
            return {**row, "refused": f"{precision}: {reason}"}
        ours[f"engine_{precision}"] = encode_calls(engine, sets)

    def make() -> list[Call]:
        reference(model)  # drawn before the clock starts
        start = time.perf_counter()
        calls = compiled_calls(model, sets)
        with torch.no_grad():
            calls[0]()
        torch.cuda.synchronize()
        row["compile_seconds"] = time.perf_counter() - start
        return calls

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # Nothing cached: what a machine pays that compiles this for the first time.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return row | in_turn(ours, {"compile": make}, batch, seconds=COMPILE_SECONDS, least=10)
