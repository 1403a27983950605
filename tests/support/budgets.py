"""Every tolerance of the numerical tests, and where it comes from; tests/README.md has the table.

None of them is what one machine gave. They come from the agreement that the golden files ask for,
from the rounding of what is stored, or from float64: `entitlement` computes what rounding costs any
sound evaluation of a function, without asking how this processor rounds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from checkpoints import relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# What tests/golden asks of a float32 implementation. Two float32 evaluations of one formula, of any
# batch, layout or order of summation, are held to the same.
TENSOR = 2e-5  # relative L2 of features, decoder outputs, logits and pixels
SPATIAL = 1e-4  # relative L2 of `spatial - 1 / K`
LOSS = 1e-4  # relative
GRADIENT = 1e-3  # relative, of gradients and of their norms
TEACHER = 1e-6  # relative L2 of an averaged tensor: two products and a sum in float32
PRESET = 5e-5  # absolute, of a pixel of the evaluation transform
PRESET_ROW = 5e-4  # absolute, of the sum of a row of 224 such pixels
PROBE = 5e-6  # relative L2 of a probe's logits: a LayerNorm eps of 1e-12 shows
TIE = 1e-3  # tokens may differ where the two best logits are no further apart

# Two float64 evaluations of one formula: thousands of roundings of 1.1e-16.
FLOAT64 = 1e-12


def rounding(dtype: torch.dtype) -> float:
    """Root mean square of the relative error of rounding to `dtype`: eps / 2 at most, uniform."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(3)


def assert_stored_as(found: Tensor, stored: Tensor) -> None:
    """Whether `found` is within `TENSOR` of the numbers that were rounded to `stored`.

    Two things follow if it is, whatever those numbers were. What of `found` lies outside the
    numbers that round to `stored` is within `TENSOR` too: an outlier shows. And the differences are
    as small as rounding makes them: their squares sum to a twelfth of the squares of the steps,
    give or take what so many uniform errors do (four of their standard deviations), and the square
    of `TENSOR`. A step of the storage is much larger than `TENSOR`, but there are many numbers.
    """
    kept, exact = stored.double(), found.detach().double().cpu()
    assert exact.shape == kept.shape and exact.isfinite().all()
    step = torch.nextafter(stored.abs(), torch.full_like(stored, math.inf)).double() - kept.abs()
    allowed = TENSOR**2 * kept.square().sum()
    beyond = ((exact - kept).abs() - step / 2).clamp_min(0).square().sum()
    assert beyond <= allowed, f"{(beyond / allowed).sqrt() * TENSOR:.3g} beyond the stored numbers"
    rounded = (stored != 0) & (stored != 1)  # these may have been cut off
    squares, steps = (exact - kept)[rounded].square().sum(), step[rounded].square()
    chance = 4 * (steps.square().sum() / 180).sqrt()  # variance of the square of a uniform number
    excess = squares - steps.sum() / 12
    assert excess <= allowed + chance, f"{(excess / allowed).sqrt() * TENSOR:.3g} and the rounding"


def assert_same_features(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two float32 evaluations of one formula, each within the goldens' tolerance: as `encode` or
    `reconstruct` gives them, of which tokens may differ at ties, and then all pixels of the image.
    """
    assert found.keys() == expected.keys()
    decided = torch.ones(len(next(iter(expected.values()))), dtype=torch.bool)
    if "tokens" in expected:
        logits = expected["logits"]
        best = logits.topk(2, dim=-1).values
        ties = best[..., 0] - best[..., 1] < 2 * TENSOR * logits.abs().amax()
        assert torch.equal(found["tokens"][~ties], expected["tokens"][~ties])
        decided = ~ties.any(1)
        assert decided.any()
    for name in expected.keys() - {"tokens"}:
        one, other, bound = found[name], expected[name], TENSOR
        if name == "reconstruction":
            one, other = one[decided], other[decided]
        if name in ("spatial", "peak_dist"):
            mean, bound = 1 / other.shape[-1], SPATIAL
            one, other = one.double() - mean, other.double() - mean
        error = relative_error(one, other)
        assert error < bound, f"{name}: {error:.3g}"


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
            peaks[name] = max(peaks[name], _peak(drawn[name], value))
    return {name: Errors(math.sqrt(squares[name] / DRAWS), peaks[name]) for name in exact}


def _peak(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact.cpu()).abs().amax()) if exact.numel() else 0.0


def assert_within_budget(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    entitled: Errors | None = None,
    name: str = "",
) -> None:
    """Error against float64 at most twice plain PyTorch's, plus the rounding of the result.

    Plain PyTorch's error is one draw of what rounding does to a formula, and may be a lucky one: a
    few numbers, such as the tokens that all of a spatial map depends on, can decide it. With
    `entitled`, the error that a sound evaluation has in the mean counts if it is larger, and no
    single number may be further off than twice what it is there.
    """
    error, of_plain = relative_error(ours, exact), relative_error(plain, exact)
    sound = Errors() if entitled is None else entitled
    budget = 2 * max(of_plain, sound.l2) + rounding(dtype)
    assert error <= budget, (
        f"{name} relative error {error:.3g}, budget {budget:.3g}: plain PyTorch's {of_plain:.3g}, "
        f"entitled {sound.l2:.3g}"
    )
    if entitled is not None:
        largest, of_plain = _peak(ours, exact), _peak(plain, exact)
        budget = 2 * max(of_plain, sound.peak) + torch.finfo(dtype).eps / 2 * _peak(
            exact, 0 * exact
        )
        assert largest <= budget, f"{name} off by {largest:.3g} somewhere, budget {budget:.3g}"
