"""What else could compute an op: plain PyTorch, its fused paths, its compiler, vendors' products.

A rival gets the very inputs of the op. One that cannot take them raises when it is first called,
and the text of its error says why it has no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from gpu_ops import op_of
from stellar_fast.reference import ops as oracles
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stellar_fast import torch_ops
from stellar_fast.weights import Linear

Function = Callable[..., Any]
EAGER = "eager"
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
    return [x, torch_ops.prepare(Linear(weight, bias), rows).weight, bias, *others]


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
