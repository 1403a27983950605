"""Each optimisation of the engine, switched off by itself, to see what it brings.

A switch hands the engine another `ops` namespace, or other options: neither the kernels nor the
engine know of it. Results stay right, within the error budget.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_fast.engine import namespaces, torch_ops
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.engine.engine import Engine
from stellar_fast.reference import ops as oracles

Ops = Mapping[str, Callable[..., Any]]
FEW = ("sparse", "cls")  # outputs for which the last block runs on 1 + K rows


@dataclass(frozen=True)
class Switch:
    """How to do without one optimisation.

    Attributes:
        what: the optimisation.
        instead: what is done without it.
        replace: the ops that differ, made from those of the engine's backend.
        graphs: False turns CUDA graphs off.
        precision: of another engine that stands in for it; None keeps the engine's.
        outputs: asked of the engine; `outputs_off` without the optimisation.
        precisions: in which the engine has the optimisation.
    """

    name: str
    what: str
    instead: str
    replace: Callable[[Any], Ops] = field(default=lambda ops: {})
    graphs: bool = True
    precision: str | None = None
    outputs: tuple[str, ...] = OUTPUTS
    outputs_off: tuple[str, ...] = OUTPUTS
    precisions: tuple[str, ...] = ("bf16", "fp16", "fp8")


def _quantized(y: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return y
    return (y.float() / scale).clamp(-oracles.FP8_MAX, oracles.FP8_MAX).to(oracles.FP8)


def _norm_apart(ops: ModuleType) -> Ops:
    @lru_cache
    def unit(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        ones = torch.ones(width, dtype=dtype, device=device)
        return ones, torch.zeros_like(ones)

    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        norm_eps: float | None = None,
        sums: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if norm_eps is not None:
            pair = unit(x.shape[-1], x.dtype, x.device)
            (x,) = ops.norm(x, *pair, norm_eps, (x.shape[1],), x.dtype)
        return ops.linear(x, weight, bias, **options)

    return {"linear": linear}


def _gelu_apart(ops: ModuleType) -> Ops:
    def linear(*arguments: Tensor, gelu: bool = False, **options: Any) -> Tensor:
        if not gelu:
            return ops.linear(*arguments, **options)
        scale = options.pop("out_scale", None)
        return _quantized(F.gelu(ops.linear(*arguments, **options)), scale)

    return {"linear": linear}


def _residual_apart(ops: ModuleType) -> Ops:
    def linear_residual(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        y = ops.linear(x, weight, bias, **options).add_(residual)
        return y, torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32).square()[None]

    return {"linear_residual": linear_residual}


def _sdpa(ops: ModuleType) -> Ops:
    def attention(
        query: Tensor, key_value: Tensor, num_heads: int, *, out_scale: float | None = None
    ) -> Tensor:
        return _quantized(torch_ops.attention(query, key_value, num_heads), out_scale)

    return {"attention": attention}


class _Apart:
    """Queries, and keys with values, where the forward expects one packed tensor to cut."""

    def __init__(self, query: Tensor, key_value: Tensor) -> None:
        self.query, self.key_value, self.shape = query, key_value, query.shape

    def __getitem__(self, index: tuple[Any, slice]) -> Tensor:
        return self.query if index[1].start is None else self.key_value


def _qkv_apart(ops: ModuleType) -> Ops:
    def linear(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
        width = weight.shape[1]
        if weight.shape[0] != 3 * width:
            return ops.linear(x, weight, bias, **options)
        scale = options.pop("weight_scale", None)

        def product(rows: slice) -> Tensor:
            scales = {} if scale is None else {"weight_scale": scale[rows]}
            return ops.linear(x, weight[rows], bias[rows], **options, **scales)

        return _Apart(product(slice(0, width)), product(slice(width, None)))

    return {"linear": linear}


@contextlib.contextmanager
def pointers(tensor: Tensor) -> Iterator[None]:
    """Within it, kernels on `tensor`'s device read memory by pointers and not by descriptors."""
    from stellar_fast.kernels import launch

    gpu = dataclasses.replace(launch.gpu_of(tensor), descriptors=False)
    with launch.on_gpu(gpu, launch.current_hook()):
        yield


def _by_pointers(ops: ModuleType) -> Ops:
    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def op(x: Tensor, *arguments: Any, **options: Any) -> Any:
            with pointers(x):
                return function(x, *arguments, **options)

        return op

    return {
        name: wrapped(getattr(ops, name))
        for name in ("linear", "linear_residual", "attention", "spatial_map")
    }


SWITCHES = (
    Switch(
        "norm statistics",
        "norms as partial sums in one epilogue and factors in the next",
        "a launch for every norm",
        _norm_apart,
        precisions=("bf16", "fp16"),
    ),
    Switch("gelu", "GELU in the epilogue of fc1", "a launch for every GELU", _gelu_apart),
    Switch(
        "residual",
        "residual and its sums of squares in the epilogues of proj and fc2",
        "launches for the sum and its squares",
        _residual_apart,
    ),
    Switch(
        "flash attention",
        "attention in one launch, no scores in memory",
        "products and softmax of plain PyTorch",
        lambda ops: {"attention": oracles.attention},
    ),
    Switch("own attention", "our attention kernel", "PyTorch's fused attention (SDPA)", _sdpa),
    Switch("packed qkv", "queries, keys and values in one product", "two products", _qkv_apart),
    Switch(
        "patch embedding",
        "patches read from uint8 pixels, the sequence written in place",
        "launches of PyTorch",
        lambda ops: {"patch_embed": torch_ops.patch_embed},
    ),
    Switch(
        "spatial map",
        "the map's logits in the epilogue of its projection, map and lowrank in one launch",
        "launches of PyTorch",
        lambda ops: {"spatial_map": torch_ops.spatial_map},
    ),
    Switch(
        "tma",
        "matrices by TMA descriptors, keys and values of a head kept in shared memory",
        "pointers, keys and values read in a loop",
        _by_pointers,
    ),
    Switch(
        "wanted rows",
        "the last block on the rows that sparse and cls need",
        "the last block on all rows",
        outputs=FEW,
        outputs_off=(*FEW, "dense"),
    ),
    Switch("cuda graphs", "one CUDA graph a batch", "a launch at a time", graphs=False),
    Switch("fp8", "products in FP8", "bf16", precision="bf16", precisions=("fp8",)),
)


def without(switch: Switch, engine: Engine) -> Engine:
    """An engine on the same weights that lacks the optimisation.

    `switch.precision` and `switch.outputs_off` are the caller's to follow: they take another engine
    or another call.
    """
    base: Any = engine._ops
    other = Engine(
        engine.config,
        namespaces.restore(base, engine._encoder),
        None,
        device=engine.device,
        precision=engine.precision,
        output_dtype=engine.output_dtype,
        max_batch=engine.max_batch,
        weights=engine.weights,
        backend=engine.backend,
        cuda_graphs=engine.cuda_graphs and switch.graphs,
    )
    ops = {name: op for name, op in vars(base).items() if callable(op)}
    changed: Any = SimpleNamespace(**{**ops, **switch.replace(base)})
    other._ops = changed
    return other
