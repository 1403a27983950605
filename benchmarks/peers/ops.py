"""One op beside what else could compute it: plain PyTorch, its fused paths, its compiler, vendors.

A rival gets the very inputs of the op. One that cannot take them raises when it is first called,
and the text of its error says why it has no figure. To add one, add it to `rivals`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness.budgets import refusal_of_op
from harness.results import BASELINES, Row, processor
from harness.timing import (
    Call,
    Turn,
    first_line,
    in_turns,
    on_gpu,
    on_host,
    rows_of,
    sets_beyond_cache,
)  # fmt: skip
from harness.workloads import Case, arguments, cases, op_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stellar_fast.config import MODELS
from stellar_fast.engine import torch_ops
from stellar_fast.reference import ops as oracles
from stellar_fast.weights.packed import Linear

CPU_CACHE = 4 << 20  # bytes that the inputs of a round exceed: a core's own cache, twice
CPU_SETS, GPU_SETS = 3, 32
ROUNDS = 12
SHORTEST = 200e-6  # seconds of a replay: events resolve half a microsecond
Function = Callable[..., Any]
EAGER = BASELINES["ops"]
COMPILED = "torch.compile"
COMPILE_MODE = "max-autotune-no-cudagraphs"  # a graph of its own would copy the inputs
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def ours(case: Case, device: torch.device) -> tuple[str, Function]:
    """The engine's own op on this device, and what it is called in a row."""
    if device.type == "cuda":
        from stellar_fast import kernels

        return "kernel", getattr(kernels, op_of(case))
    return "engine", getattr(torch_ops, op_of(case))


def laid_out(values: list[Any], case: Case) -> list[Any]:
    """The arguments with the weight as `Engine` lays it out at load, for its op on a CPU."""
    if op_of(case) not in ("linear", "linear_residual"):
        return values
    x, weight, bias, *others = values
    rows = x.shape[0] * x.shape[1]
    return [x, torch_ops.laid_out(Linear(weight, bias), rows).weight, bias, *others]


def _sdpa(backend: SDPBackend) -> Function:
    def attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
        with sdpa_kernel(backend):
            return torch_ops.attention(query, key_value, num_heads)

    return attention


def _product(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.linear(x, weight)


def _fp8_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *_: Any,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    **__: Any,
) -> Tensor:
    rows = x.flatten(0, 1)
    if x_scale is None:
        x_scale = weight_scale.new_ones(len(rows))
    return torch._scaled_mm(
        rows,
        weight.T,
        scale_a=x_scale.reshape(-1, 1),
        scale_b=weight_scale[None],
        out_dtype=bias.dtype,
    )


def rivals(case: Case, device: torch.device, compiles: bool) -> Iterator[tuple[str, Function]]:
    """Names and functions, with the signature of the op.

    The vendor's product is the product alone: neither norm, bias, GELU nor residual. It bounds what
    calling the vendor could bring.
    """
    name = op_of(case)
    yield EAGER, getattr(oracles, name)
    if compiles:
        torch.compiler.reset()  # past eight shapes of a function it would run uncompiled
        yield (
            COMPILED,
            torch.compile(getattr(oracles, name), mode=COMPILE_MODE, dynamic=False),
        )
    if device.type == "cuda" and case.precision != "fp8":
        yield "torch backend", getattr(torch_ops, name)
    if name in ("linear", "linear_residual"):
        if case.precision == "fp8":
            yield "product alone, cuBLAS", _fp8_product
        else:
            label = "cuBLAS" if device.type == "cuda" else "PyTorch"
            yield f"product alone, {label}", _product
    if name == "attention" and case.precision != "fp8":
        on_gpu_only = ("sdpa efficient", "sdpa cudnn")
        for label, backend in SDPA.items():
            if device.type == "cuda" or label not in on_gpu_only:
                yield label, _sdpa(backend)


def has_graphs(device: torch.device) -> bool:
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
        others: Iterable[tuple[str, Function]] | None = None,
    ) -> None:
        self.case = case
        self.not_run: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.compile_seconds: float | None = None
        self._graphs = has_graphs(device)
        cache, most = CPU_CACHE, CPU_SETS
        if self._graphs:
            cache, most = torch.cuda.get_device_properties(device).L2_cache_size, GPU_SETS
        count = sets_beyond_cache(int(case.moved), cache, most)
        self._sets = [arguments(case, device, seed) for seed in range(count)]
        self.ours, function = ours(case, device)
        own = self._sets if self._graphs else [(laid_out(v, case), k) for v, k in self._sets]
        self.refused = self._refusal(function, own)
        self._turns: dict[str, Turn] = {}
        if self.refused is not None:
            return
        self._enter(self.ours, function, own)
        for name, rival in rivals(case, device, compiles) if others is None else others:
            start = time.perf_counter()
            try:
                self._enter(name, rival, self._sets)
            except Exception as error:
                self._alive()
                self.not_run[name] = first_line(error)
                continue
            if name == COMPILED:
                self.compile_seconds = time.perf_counter() - start

    def _alive(self) -> None:
        """Raises where the device is lost."""
        if self._graphs:
            torch.cuda.synchronize()

    def _refusal(self, function: Function, own: list) -> str | None:
        for index, (values, keywords) in enumerate(self._sets):
            layout = own[index][0]

            def call(*_: Any, layout: list = layout, **options: Any) -> Any:
                return function(*layout, **options)

            reason = refusal_of_op(self.case, call, (values, keywords))
            if reason is not None:
                return f"inputs {index}: {reason}"
        return None

    def _enter(self, name: str, function: Function, sets: list) -> None:
        calls = [lambda v=v, k=k: function(*v, **k) for v, k in sets]

        def over_all() -> None:
            for call in calls:
                call()

        with torch.no_grad():
            over_all()
            if self._graphs:
                replay, times = _replayed(over_all)
                self._turns[name] = on_gpu([replay], times * len(calls))
            else:
                self._turns[name] = on_host(calls)

    def run(self, seconds: float = 0.0, least: int = ROUNDS) -> Race:
        """Rounds for `seconds`, `least` of them whatever the time; none where ours is refused."""
        with torch.no_grad():
            self.seconds, late = in_turns(
                self._turns, least=least, seconds=seconds, must=(self.ours,), alive=self._alive
            )
        self.not_run |= late
        return self

    def once(self) -> None:
        """A call of ours alone."""
        with torch.no_grad():
            self._turns[self.ours](0)

    def rows(self, stage: str = "ops") -> list[Row]:
        """The rows of a result file, ours first."""
        case = self.case
        base = {
            "stage": stage,
            "key": case.key,
            "op": case.name,
            "model": case.model,
            "batch": case.batch,
            "precision": case.precision,
        }
        work = {"flops": case.flops, "bytes": case.moved}
        if self.refused is not None:
            return [{"name": self.ours, **base, **work, "refused": self.refused}]
        rows = rows_of(self.seconds, **base)
        for row in rows:
            median = row["median"]
            if row["name"] == self.ours:
                row |= work | {"tflops": case.flops / median / 1e12}
                row["gb_per_second"] = case.moved / median / 1e9
            if row["name"] == COMPILED:
                row |= {"compile_seconds": self.compile_seconds, "compile_mode": COMPILE_MODE}
        return rows + [{"name": n, **base, "not_run": why} for n, why in self.not_run.items()]


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """What is measured here: bf16 and FP8 on a GPU, float32 and fast bf16 on a CPU."""
    if device.type == "cuda":
        return ("bf16", "fp8") if torch.cuda.get_device_capability(device) >= (8, 9) else ("bf16",)
    return ("fp32", "bf16") if processor()["bf16_matrix_units"] else ("fp32",)


def points(device: torch.device) -> Iterator[tuple[Case, bool]]:
    """The cases of `pytest benchmarks/`, and whether torch.compile takes part.

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
                yield case, compiles


def report(rows: list[Row]) -> Iterator[str]:
    """The rows of one case, with their floor, for a terminal."""
    own, *others = rows
    if "refused" in own:
        yield f"  {own['key']:38} refused: {own['refused']}"
        return
    median = own["median"]
    ratios = [f"{row['name']} {row['median'] / median:.2f}x" for row in others if "median" in row]
    floor = f"{own['of_floor']:5.0%} of its floor by {own['bound']}; " if "floor" in own else ""
    yield f"  {own['key']:38} {median * 1e6:9.1f} us {floor}{', '.join(ratios)}"
    for row in others:
        if "not_run" in row:
            yield f"    {row['name']} did not run: {row['not_run']}"
