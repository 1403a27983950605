"""One op against its rivals on one device, in turns, and the result file of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ceilings
import harness
import pytest
import torch
from cases import Case, cases
from ceilings import Floor
from gpu_ops import DTYPES, arguments, op_of, refusal
from gpu_timing import first_line, sets_beyond_cache
from op_rivals import COMPILED, EAGER, laid_out, ours, rivals

from stellar_fast.config import MODELS

CPU_CACHE = 4 << 20  # bytes that the inputs of a round exceed: a core's own cache, twice
CPU_SETS, GPU_SETS = 3, 32
ROUNDS = 12
SHORTEST = 200e-6  # seconds of a replay: events resolve half a microsecond
Call = Callable[[], object]


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _replayed(call: Call) -> tuple[Call, int]:
    """`call` as a CUDA graph that repeats it for `SHORTEST`, and how often: no launch is timed."""

    def captured(times: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph

    call()
    torch.cuda.synchronize()
    once = captured(1)
    once.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    once.replay()
    stop.record()
    torch.cuda.synchronize()
    times = max(1, round(SHORTEST * 1e3 / max(start.elapsed_time(stop), 1e-3)))
    graph = captured(times) if times > 1 else once
    return graph.replay, times


class Race:
    """Our op and its rivals on the same rotating inputs.

    On a GPU each is a CUDA graph that runs over all sets of inputs, which together exceed the L2
    cache; on a CPU each round takes the next set.

    Args:
        compiles: whether torch.compile takes part, which needs seconds to minutes.
        others: names and functions instead of the usual rivals.

    Attributes:
        refused: why there is no figure for ours; then nobody runs.
        not_run: rivals that could not run, and why.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        compiles: bool,
        others: Iterable[tuple[str, Callable[..., Any]]] | None = None,
    ) -> None:
        self.case, self.device = case, device
        self.not_run: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.compile_seconds: float | None = None
        self._round = 0
        self._graphs = on_gpu(device)
        cache, most = CPU_CACHE, CPU_SETS
        if self._graphs:
            cache, most = torch.cuda.get_device_properties(device).L2_cache_size, GPU_SETS
        count = sets_beyond_cache(int(case.moved), cache, most)
        self._sets = [arguments(case, device, seed) for seed in range(count)]
        self.ours, function = ours(case, device)
        own = self._sets if self._graphs else [(laid_out(v, case), k) for v, k in self._sets]
        self.refused = self._refusal(function, own)
        self._calls: dict[str, tuple[Sequence[Call], int]] = {}
        if self.refused is not None:
            return
        self._enter(self.ours, function, own)
        for name, rival in rivals(case, device, compiles) if others is None else others:
            start = time.perf_counter()
            try:
                self._enter(name, rival, self._sets)
            except Exception as error:
                if self._graphs:
                    torch.cuda.synchronize()  # raises where the device is lost
                self.not_run[name] = first_line(error)
                continue
            if name == COMPILED:
                self.compile_seconds = time.perf_counter() - start

    def _refusal(self, function: Callable[..., Any], own: list) -> str | None:
        for index, (values, keywords) in enumerate(self._sets):
            layout = own[index][0]

            def call(*_: Any, layout: list = layout, **options: Any) -> Any:
                return function(*layout, **options)

            reason = refusal(self.case, call, (values, keywords))
            if reason is not None:
                return f"inputs {index}: {reason}"
        return None

    def _enter(self, name: str, function: Callable[..., Any], sets: list) -> None:
        calls = [lambda v=v, k=k: function(*v, **k) for v, k in sets]
        with torch.no_grad():
            for call in calls:
                call()
            if self._graphs:

                def over_all() -> None:
                    for call in calls:
                        call()

                replay, times = _replayed(over_all)
                self._calls[name] = [replay], times * len(calls)
            else:
                self._calls[name] = calls, 1
        self.seconds[name] = []

    def _turn(self, name: str) -> None:
        calls, times = self._calls[name]
        call = calls[self._round % len(calls)]
        with torch.no_grad():
            if self._graphs:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                stop.record()
                stop.synchronize()
                elapsed = start.elapsed_time(stop) / 1e3
            else:
                begin = time.perf_counter()
                call()
                elapsed = time.perf_counter() - begin
        self.seconds[name].append(elapsed / times)

    def others(self) -> None:
        """A timed turn of each rival."""
        for name in self._calls:
            if name != self.ours:
                self._turn(name)

    def our_turn(self) -> None:
        """A timed turn of ours, which ends the round."""
        self._turn(self.ours)
        self._round += 1

    def row(self) -> dict[str, Any]:
        """The row of a result file."""
        case = self.case
        row: dict[str, Any] = {
            "key": case.key,
            "op": case.name,
            "model": case.model,
            "batch": case.batch,
            "precision": case.precision,
            "flops": case.flops,
            "bytes": case.moved,
            "ours": self.ours,
        }
        if self.refused is not None:
            return {**row, "refused": self.refused}
        for name, seconds in self.seconds.items():
            row[name] = asdict(harness.Timing.of(seconds))
        median = row[self.ours]["median"]
        row |= {"tflops": case.flops / median / 1e12, "gb_per_second": case.moved / median / 1e9}
        if self.compile_seconds is not None:
            row["compile_seconds"] = self.compile_seconds
        return {**row, "not_run": self.not_run} if self.not_run else row


def measure(case: Case, seconds: float, compiles: bool, least: int = 10) -> dict[str, Any]:
    """The row of a case on the GPU, timed for `seconds` or `least` rounds, whichever is more."""
    return run(Race(case, torch.device("cuda"), compiles), seconds, least).row()


def run(race: Race, seconds: float, least: int = 10) -> Race:
    """Rounds for `seconds`, `least` of them whatever the time; none where ours is refused."""
    end, rounds = time.perf_counter() + seconds, 0
    while race.refused is None and (rounds < least or time.perf_counter() < end):
        race.others()
        race.our_turn()
        rounds += 1
    return race


@dataclass
class Record:
    """What the op benchmarks of a session measured, for one result file."""

    device: torch.device
    ceilings: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def processor(self) -> dict[str, object]:
        if self.device.type == "cuda":
            return {"name": torch.cuda.get_device_name(self.device)}
        return harness.processor()

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row, with its floor by this session's ceilings."""
        if "refused" not in row:
            rate = self.ceilings[f"product {row['precision']}"]
            floor = Floor.of(row["flops"], row["bytes"], rate, self.ceilings["copy"])
            row |= {
                "floor": floor.seconds,
                "bound": floor.bound,
                "of_floor": floor.seconds / row[row["ours"]]["median"],
            }
        self.rows.append(row)

    def write(self) -> Path:
        """The result file."""
        folder = "cpu"
        if self.device.type == "cuda":
            folder = harness.folder_of(torch.cuda.get_device_name(self.device))
        return harness.write_result(
            folder,
            "ops",
            self.rows,
            processor=self.processor,
            baseline=EAGER,
            ceilings=self.ceilings,
        )


def cpu_ceilings(precisions: Sequence[str]) -> dict[str, float]:
    """FLOP/s of a large product in each precision and bytes/s of a copy, on this CPU."""
    side, size = 4096, 1 << 28
    found = {}
    for precision in precisions:
        a, b = (torch.randn(side, side, dtype=DTYPES[precision]) for _ in range(2))
        calls = {precision: lambda a=a, b=b: torch.mm(a, b)}
        found[f"product {precision}"] = 2 * side**3 / _fastest(calls)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return {**found, "copy": 2 * size / _fastest({"copy": lambda: target.copy_(source)})}


def _fastest(calls: Mapping[str, Call]) -> float:
    """Median seconds of the only one of `calls`."""
    alternation = harness.Alternation(calls, warmup=1)
    for _ in range(5):
        alternation.round()
    (timing,) = alternation.timings().values()
    return timing.median


def gpu_ceilings(precisions: Sequence[str]) -> dict[str, float]:
    """`cpu_ceilings` of the current CUDA device."""
    found = {
        f"product {precision}": ceilings.measure(precision)["tflops"] * 1e12
        for precision in precisions
    }
    return {**found, "copy": ceilings.measure("copy")["gb_per_second"] * 1e9}


def ceilings_of(device: torch.device) -> dict[str, float]:
    """Those of every precision that is measured here."""
    find = gpu_ceilings if device.type == "cuda" else cpu_ceilings
    return find(precisions_of(device))


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """What is measured here: bf16 and FP8 on a GPU, float32 and fast bf16 on a CPU."""
    if device.type == "cuda":
        return ("bf16", "fp8") if torch.cuda.get_device_capability(device) >= (8, 9) else ("bf16",)
    return ("fp32", "bf16") if harness.processor()["bf16_matrix_units"] else ("fp32",)


def points(ops: Sequence[str], device: torch.device) -> Iterator[tuple[Case, bool]]:
    """The cases of an op's file, and whether torch.compile takes part.

    On a CPU one image through the five models and eight through B/16; on a GPU batch 1 and 64.
    """
    if device.type == "cuda":
        wanted = [(model, batch) for model in MODELS for batch in (1, 64)]
    else:
        wanted = [*((model, 1) for model in MODELS), ("stellar-b16", 8)]
    for model, batch in wanted:
        compiles = batch > 1 and model in ("stellar-b16", "stellar-h16")
        for precision in precisions_of(device):
            for case in cases(MODELS[model], batch, precision):
                if op_of(case) in ops:
                    yield case, compiles


def parameters(*ops: str) -> tuple[str, list]:
    """What `pytest.mark.parametrize` takes: the cases of `ops` on this machine's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    marks = [pytest.mark.gpu] if cuda else []
    found = [
        pytest.param(case, device, compiles, id=case.key, marks=marks)
        for case, compiles in points(ops, device)
    ]
    if not cuda:
        missing = pytest.mark.skip(reason="the Triton kernels need a CUDA device")
        found.append(pytest.param(None, None, False, id="kernels", marks=missing))
    return "case, device, compiles", found


def table(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> Iterator[str]:
    """Rows for a terminal."""
    rates = ", ".join(
        f"{name} {rate / 1e9:.1f} GB/s" if name == "copy" else f"{name} {rate / 1e12:.3f} TFLOP/s"
        for name, rate in ceilings.items()
    )
    yield f"ceilings of this run: {rates}"
    for row in rows:
        if "refused" in row:
            yield f"  {row['key']:38} refused: {row['refused']}"
            continue
        median = row[row["ours"]]["median"]
        ratios = ", ".join(
            f"{name} {value['median'] / median:.2f}x"
            for name, value in row.items()
            if isinstance(value, dict) and "median" in value and name != row["ours"]
        )
        yield (
            f"  {row['key']:38} {median * 1e6:9.1f} us {row['of_floor']:5.0%} of its floor by "
            f"{row['bound']}; {ratios}"
        )
        for name, reason in row.get("not_run", {}).items():
            yield f"    {name} did not run: {reason}"
