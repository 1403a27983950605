"""What a CPU computes a model fastest in: tried on a part of its shape, not told by a name.

AVX512-BF16 without matrix units is nearly twice as fast as float32 on one processor, and slower
than it on another.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import LAYER_NORM_EPS, BackboneConfig
from ..precision import DTYPES
from ..weights.packed import Block, Linear
from . import namespaces
from .encoder import run_block

ROUNDS = 3
HOPELESS = 3.0  # how many times the fastest round a first one may take for a candidate to go on
# A back end has to be this much faster than the one before it: a busy machine must not decide.
CLEARLY = 1.5
T = TypeVar("T")
Shape = tuple[BackboneConfig, int]  # and the rows of an image's sequence


@functools.lru_cache(16)
def fastest(
    names: tuple[str, ...],
    precisions: tuple[str, ...],
    backbone: BackboneConfig,
    rows: int,
    threads: int,
) -> tuple[str, str]:
    """Of these back ends and precisions the pair that computes one image of a model fastest.

    The precision by one product, since the processor decides it, on the back end that will run; the
    back end by a whole block.

    Args:
        rows: of an image's sequence.
        threads: that torch has now.
    """
    shape = backbone, rows
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        name, precision = names[0], _precision(names[0], precisions, shape)
        if len(names) > 1:
            blocks = {name: _block(name, precision, shape) for name in names}
            name = _first(blocks, CLEARLY)
            if name != names[0]:
                precision = _precision(name, precisions, shape)
    return name, precision


def _precision(name: str, precisions: tuple[str, ...], shape: Shape) -> str:
    if len(precisions) == 1:
        return precisions[0]
    return _first({precision: _product(name, precision, shape) for precision in precisions})


def _first(calls: Mapping[T, Callable[[], object]], clearly: float = 1.0) -> T:
    """Whose call is the fastest, by `clearly` times if it is not the first.

    They take turns, and the best round of each counts: others use the machine too.
    """
    for call in calls.values():
        call()  # compiles
    best = {name: _seconds(call) for name, call in calls.items()}
    for name in [*calls] * ROUNDS:
        if best[name] < HOPELESS * min(best.values()):
            best[name] = min(best[name], _seconds(calls[name]))
    first, fastest = next(iter(calls)), min(best, key=best.__getitem__)
    return fastest if best[fastest] * clearly < best[first] else first


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _layer(out: int, depth: int, dtype: torch.dtype) -> Linear:
    """Which numbers these are changes no product's time."""
    weight = torch.full((out, depth), 1 / depth, dtype=dtype)
    return Linear(weight, torch.zeros(out, dtype=dtype))


def _product(backend: str, precision: str, shape: Shape) -> Callable[[], object]:
    vit = shape[0]
    layer = _layer(vit.intermediate_size, vit.hidden_size, DTYPES[precision])

    def forward(ops: Any, layer: Linear, x: Any) -> Any:
        return ops.linear(x, layer.weight, layer.bias, norm_eps=LAYER_NORM_EPS, gelu=True)

    return _on(backend, precision, shape, forward, layer, vit.intermediate_size)


def _block(backend: str, precision: str, shape: Shape) -> Callable[[], object]:
    vit, dtype = shape[0], DTYPES[precision]
    width, hidden = vit.hidden_size, vit.intermediate_size
    shapes = {"qkv": (3 * width, width), "proj": (width, width)}
    shapes |= {"fc1": (hidden, width), "fc2": (width, hidden)}
    block = Block(**{name: _layer(*shape, dtype) for name, shape in shapes.items()})

    def forward(ops: Any, block: Block, x: Any) -> Any:
        return run_block(ops, block, x, None, vit.num_attention_heads)[0]

    return _on(backend, precision, shape, forward, block, width)


def _on(
    backend: str,
    precision: str,
    shape: Shape,
    forward: Callable[[Any, Any, Any], Any],
    weights: Any,
    columns: int,
) -> Callable[[], object]:
    """A call of `forward` on the sequence of one image, which gives (1, S, columns)."""
    ops, width, rows = namespaces.ops_of(backend), shape[0].hidden_size, shape[1]
    x = torch.linspace(-1, 1, rows * width).view(1, rows, width)
    runner = namespaces.float_runner(backend, precision)
    if runner is None:
        weights = namespaces.prepare(backend, weights, rows)
        return functools.partial(forward, ops, weights, x.to(DTYPES[precision]))
    inputs, out = ((x, (-1, -1, width)),), {"y": torch.empty(1, rows, columns)}

    def trace(x: Any) -> dict[str, Tensor]:
        return {"y": forward(ops, weights, x)}

    return lambda: runner.run("trial", trace, inputs, out)
