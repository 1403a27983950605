"""`encode` end to end on a GPU: ours beside plain PyTorch, its compiler, and transformers' ViT.

Rows of the stages "encode", "compile", "compilers", "sweep" and "curves".
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping

import torch
from gpu.subjects import (
    COMPILE_MODE,
    DEVICE,
    SIDE,
    Loaded,
    Maker,
    compiled_calls,
    encode_calls,
    engines,
    facts,
    inputs,
    load,
    reference,
    refusal,
    rivals,
)  # fmt: skip
from harness.results import COMPILED_BF16, Row
from harness.timing import Call, first_line, in_turns, on_host, rows_of, turns_of
from torch import Tensor

import stellar_fast

LATENCY_CALLS = 1000
COMPILE_SECONDS = 3.0  # of timing beside the compiler
ENERGY_SECONDS = 2.0  # NVML's counter steps every 20 to 100 ms


def alive() -> None:
    """Raises where the device is lost; else frees what a failed call has left."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def race(
    ours: Mapping[str, list[Call]],
    makers: Mapping[str, Maker],
    common: Row,
    *,
    seconds: float,
    least: int = 10,
) -> list[Row]:
    """A row of each: its time, or `not_run` with the reason of a rival.

    Raises:
        Exception: ours failed, or the device is lost.
    """
    not_run: dict[str, str] = {}
    calls = dict(ours)
    for name, make in makers.items():
        try:
            calls[name] = make()
        except Exception as error:
            alive()
            not_run[name] = first_line(error)
    with torch.no_grad():
        taken, late = in_turns(
            turns_of(calls, DEVICE),
            least=least,
            seconds=seconds,
            warmup=3,
            must=ours,
            alive=alive,
        )
    rows = rows_of(taken, **common)
    for row in rows:
        row["images_per_second"] = row["batch"] / row["median"]
    failed = (not_run | late).items()
    return rows + [{"name": name, **common, "not_run": reason} for name, reason in failed]


def latency(calls: list[Call], count: int) -> Row:
    """Host seconds of single calls, each waited for."""
    turns = {"engine": on_host(calls, torch.cuda.synchronize)}
    taken = in_turns(turns, least=count, most=count)[0]["engine"]
    return {
        "latency_median": statistics.median(taken),
        "latency_p99": statistics.quantiles(taken, n=100)[98],
        "latency_calls": count,
    }


def joules() -> Callable[[], float]:
    """Reads what the device has drawn since its driver was loaded, by NVML.

    Raises:
        Exception: why it cannot be read: no package, no driver, a device without the counter.
    """
    import pynvml

    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3


def energy(call: Call, batch: int) -> Row:
    """Joules an image of back-to-back calls, what the device draws idle included."""
    try:
        read = joules()
    except ImportError:
        return {"energy": "not reported: nvidia-ml-py is not installed (extra `peers`)"}
    except Exception as error:  # NVML has a class for each of its codes
        return {"energy": f"not reported: {first_line(error)}"}
    torch.cuda.synchronize()
    before, end, calls = read(), time.perf_counter() + ENERGY_SECONDS, 0
    while time.perf_counter() < end:
        for _ in range(8):
            call()
        calls += 8
        torch.cuda.synchronize()
    return {"joules_per_image": (read() - before) / calls / batch}


def captures(engine: stellar_fast.Engine) -> bool:
    """Whether its batches run as CUDA graphs; one that fails to capture goes on without."""
    return engine._graphs is not None and len(engine._graphs) > 0


def _first(loaded: Loaded, images: Tensor) -> Row:
    """The first call, which compiles, and the next, which captures; the memory that they need."""
    engine = loaded.engine
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - loaded.size
    start = time.perf_counter()
    engine.encode(images, check_range=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    engine.warm_up((len(images),), ((images.shape[2], images.shape[3]),))
    torch.cuda.synchronize()
    return {
        "load_seconds": loaded.seconds,
        "first_call_seconds": seconds,
        "warm_up_seconds": time.perf_counter() - start - seconds,
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
) -> list[Row]:
    """Images a second of the engine and its rivals in turn; `closely`: latency and energy too."""
    loaded: Loaded = engines(model, precision)
    engine, sets = loaded.engine, inputs(batch, side)
    own = facts(model, batch, precision, side, engine) | _first(loaded, sets[0])
    reason = refusal(engine, sets[0])
    if reason is not None:
        return [{**own, "refused": reason}]
    calls = encode_calls(engine, sets)
    common = {"model": model, "batch": batch, "precision": precision, "side": side}
    makers = rivals(model, sets, against)
    rows = race({own["name"]: calls}, makers, common, seconds=seconds, least=least)
    rows[0] = own | rows[0] | {"tflops": own["flops"] / rows[0]["median"] / 1e12}
    if closely:
        rows[0] |= energy(calls[0], batch)
        if batch == 1:
            rows[0] |= latency(calls, LATENCY_CALLS)
    return rows


def compiled(model: str, batch: int, precisions: Collection[str]) -> list[Row]:
    """The engine in `precisions` and torch.compile of the reference in bf16, in turn."""
    sets = inputs(batch)
    common = {"model": model, "batch": batch}
    ours: dict[str, list[Call]] = {}
    for precision in precisions:
        engine = load(model, precision).engine  # all are needed at once
        reason = refusal(engine, sets[0])
        if reason is not None:
            return [{"name": f"engine {precision}", **common, "refused": reason}]
        ours[f"engine {precision}"] = encode_calls(engine, sets)
    taken: Row = {"compile_mode": COMPILE_MODE}

    def make() -> list[Call]:
        reference(model)  # drawn before the clock starts
        start = time.perf_counter()
        calls = compiled_calls(model, sets)
        with torch.no_grad():
            calls[0]()
        torch.cuda.synchronize()
        taken["compile_seconds"] = time.perf_counter() - start
        return calls

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # Nothing cached: what a machine pays that compiles this for the first time.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = race(ours, {COMPILED_BF16: make}, common, seconds=COMPILE_SECONDS)
    return [row | taken if row["name"] == COMPILED_BF16 else row for row in rows]
