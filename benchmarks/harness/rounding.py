"""What rounding costs any sound evaluation of a function, from float64 alone.

The tests' budgets and the benchmarks' come from here: neither asks how this processor rounds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def relative_error(found: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference over that of `exact`, in float64; of no numbers it is 0."""
    exact = exact.double()
    scale = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((found.double() - exact).norm() / scale).item()


def rounding(dtype: torch.dtype) -> float:
    """Root mean square of the relative error of rounding to `dtype`: eps / 2 at most, uniform."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(3)


# Ops of aten whose result is rounded once, and those that sum products, with the number of products
# in each sum. What is not listed moves numbers and rounds none.
_ROUNDED = {
    "add", "sub", "mul", "div", "rsub", "reciprocal", "rsqrt", "sqrt", "pow", "exp", "log", "sin",
    "cos", "gelu", "silu", "sigmoid", "mean", "sum", "linalg_vector_norm", "_softmax",
    "_log_softmax", "native_layer_norm", "native_group_norm", "upsample_bicubic2d",
}  # fmt: skip
_PRODUCTS: dict[str, Callable[..., int]] = {
    "mm": lambda a, b: b.shape[-2],
    "bmm": lambda a, b: b.shape[-2],
    "addmm": lambda c, a, b: b.shape[-2],
    "baddbmm": lambda c, a, b: b.shape[-2],
    "convolution": lambda x, weight, *_: weight[0].numel(),
}


class _Rounding(TorchDispatchMode):
    """Adds to the result of each float64 op what rounding in `dtype` would: Monte Carlo arithmetic.

    A result is off by up to half a step of `dtype`, uniformly. A sum of n products, accumulated in
    float32 at least, one product after the other as the plainest sound kernel does, is off by the
    rounding of n partial sums too. They grow as a random walk does, so their errors add up to
    sqrt(n / 2) roundings of the sum.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.half_step = torch.finfo(dtype).eps / 2
        self.accumulated = rounding(torch.promote_types(dtype, torch.float32))
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__.rstrip("_")
        if name in _PRODUCTS:
            given = [x for x in arguments if isinstance(x, Tensor)]
            self._walk(result, _PRODUCTS[name](*given))
        elif name in _ROUNDED:
            self._round(result[0] if isinstance(result, tuple) else result)
        return result

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def _round(self, x: Tensor) -> None:
        if x.dtype == torch.float64:
            steps = torch.empty_like(x).uniform_(-1, 1, generator=self._generator(x.device))
            binade = torch.frexp(x).exponent - 1
            x += torch.ldexp(steps.mul_(self.half_step), binade)

    def _walk(self, x: Tensor, length: int) -> None:
        if x.dtype == torch.float64:
            size = x.square().mean(-1, keepdim=True).sqrt()
            step = torch.empty_like(x).normal_(generator=self._generator(x.device))
            self._round(x.addcmul_(size, step, value=self.accumulated * math.sqrt(length / 2)))


@contextlib.contextmanager
def rounding_as(dtype: torch.dtype, seed: int, model: nn.Module | None = None) -> Iterator[None]:
    """Float64 arithmetic with the errors of a sound evaluation in `dtype`, drawn from `seed`.

    The parameters of `model` are off by their rounding meanwhile: an implementation may fold one
    layer into another, and round the result.
    """
    mode = _Rounding(dtype, seed)
    exact = [] if model is None else [(p, p.detach().clone()) for p in model.parameters()]
    try:
        for parameter, _ in exact:
            mode._round(parameter.data)
        with mode:
            yield
    finally:
        for parameter, value in exact:
            parameter.data = value


class Errors(NamedTuple):
    """What rounding alone brings into an output: relative L2, and the largest of one number."""

    l2: float = 0.0
    peak: float = 0.0


DRAWS = 4  # of the errors


def entitlement(
    evaluate: Callable[[], dict[str, Tensor]],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    model: nn.Module | None = None,
) -> dict[str, Errors]:
    """The errors that rounding alone brings into a sound evaluation of a function.

    Args:
        evaluate: the function in float64.
        exact: what it gives.
        dtype: what each result is rounded to.
        model: whose parameters `evaluate` reads, in float64.

    Returns:
        For each name in `exact` the root mean square over draws of the relative L2 error, and the
        largest error of a single number in any of them.
    """
    squares, peaks = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0.0)
    for seed in range(DRAWS):
        with torch.no_grad(), rounding_as(dtype, seed, model):
            drawn = evaluate()
        for name, value in exact.items():
            squares[name] += relative_error(drawn[name], value) ** 2
            peaks[name] = max(peaks[name], peak_error(drawn[name], value))
    return {name: Errors(math.sqrt(squares[name] / DRAWS), peaks[name]) for name in exact}


def peak_error(found: Tensor, exact: Tensor) -> float:
    """The largest error of a single number."""
    return float((found.double().cpu() - exact.cpu()).abs().amax()) if exact.numel() else 0.0
