"""What the kernels' tests share: where they run, and the error budget.

Without a GPU, kernels run in Triton's interpreter on CPU tensors, in float32 and float16: its bf16
products are wrong. With one, the same tests run compiled, bf16 included.
"""

import contextlib
import math
from collections.abc import Iterator

import interpreter_arithmetic
import pytest
import torch

from stellar_fast.kernels import gpus, launch
from stellar_fast.reference import ops as oracles

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    interpreter_arithmetic.install()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# Pointers and registers, or TMA descriptors: the two ways that kernels reach memory.
GPUS = [None] if ON_GPU else [80, 90]
TWO_WAYS = [(gpu, dtype) for gpu in GPUS for dtype in DTYPES]
KERNEL_MARKS = [
    pytest.mark.kernels,
    pytest.mark.numerical,
    pytest.mark.usefixtures("poisoned", "bounded"),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float64 numbers, the same wherever they are drawn."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def strided(x: torch.Tensor) -> torch.Tensor:
    """`x` as a view into memory that is NaN everywhere else."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 16), float("nan"))
    wide[..., 8:-8] = x
    return wide[..., 8:-8]


@contextlib.contextmanager
def on_gpu(arch: int | None) -> Iterator[None]:
    """The launch table of `arch`; None is the device's own."""
    with contextlib.nullcontext() if arch is None else launch.on_gpu(arch):
        yield


def cast(value, dtype: torch.dtype, device: torch.device = DEVICE):
    """Tensors of float64 to `dtype`, every tensor to `device`; dtypes to `dtype`."""
    if isinstance(value, torch.dtype):
        return dtype
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.dtype == torch.float64 else value.dtype)
    return value


def rounding(dtype: torch.dtype) -> float:
    """Root mean square of the relative error of rounding to `dtype`: eps / 2 at most, uniform."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(3)


def accumulation(terms: int) -> float:
    """Root mean square of the relative error of a float32 sum of `terms` random products.

    Added one after another, the worst order: the i-th addition rounds a partial sum whose mean
    square is i / terms of the whole's, so the roundings add up to (terms + 1) / 2 of one, and those
    of the products to one more. Tiles, trees and fused multiply-adds have less.
    """
    return rounding(torch.float32) * math.sqrt((terms + 3) / 2)


def shaken(value, terms: int):
    """Float64 operands with the errors that float32 sums of `terms` products stand for.

    A sum with rounding errors is the exact sum of operands that are a little different (Wilkinson's
    backward error); half of the variance falls to each of a product's two operands. What an exact
    op makes of them is therefore as far from the exact result as a sound float32 computation may
    expect to be, however the op amplifies its inputs: a softmax of large scores does.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    noise = draw(*value.shape, seed=terms).to(value.device)
    return value.double() * (1 + accumulation(terms) / math.sqrt(2) * noise)


def assert_budget(ours, plain, exact, dtype: torch.dtype, floor=None) -> None:
    """Error against float64 at most twice plain PyTorch's, plus the rounding of the result.

    Where plain PyTorch is more exact than a float32 sum can be expected to be, by luck or since the
    processor adds in another order, `floor` takes its place: the exact op on `shaken` operands. It
    is computed in float64, the same on every processor. Results in half precision need none: plain
    PyTorch's are stored in it as well, with a rounding a thousand times those of float32 sums.
    """
    assert ours.shape == exact.shape
    ours, plain, exact = (tensor.double().cpu() for tensor in (ours, plain, exact))
    assert ours.isfinite().all()
    if not exact.numel():
        return
    scale = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    expected = (plain - exact).norm()
    if floor is not None:
        expected = torch.maximum(expected, (floor.cpu() - exact).norm())
    budget = 2 * expected / scale + rounding(dtype)
    error = (ours - exact).norm() / scale
    assert error <= budget, f"relative error {error:.3g}, budget {budget:.3g}"


def assert_within_budget(kernel, *arguments, dtype: torch.dtype, terms: int, **keywords) -> None:
    """`kernel` against the oracle of its name, on arguments drawn in float64.

    Float64 sees the numbers after they were rounded to the dtype under test. `terms` is the length
    of the longest sum behind one number of the result.
    """
    oracle = getattr(oracles, kernel.__name__)
    rounded = [cast(value, dtype) for value in arguments]
    options = {name: cast(value, dtype) for name, value in keywords.items()}

    def run(function, change=lambda value: value) -> list[torch.Tensor]:
        result = function(
            *map(change, rounded), **{name: change(value) for name, value in options.items()}
        )
        return [result] if isinstance(result, torch.Tensor) else list(result)

    results = (
        run(kernel),
        run(oracle),
        run(oracle, _widened),
        run(oracle, lambda value: shaken(_widened(value), terms)),
    )
    for ours, plain, exact, floor in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert_budget(ours, plain, exact, dtype, floor)


def _widened(value):
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def launches(call) -> list[list[tuple]]:
    """What `call()` launches on each part of the table: grid, options and all but tensors.

    But for when it starts, which differs between parts.
    """
    found = []
    for arch in gpus.GPUS:
        seen: list[launch.Launch] = []
        with launch.on_gpu(arch, seen.append):
            call()
        found.append(
            [
                (
                    item.kernel.__name__,
                    item.grid,
                    {k: v for k, v in item.options.items() if k != "launch_pdl"},
                    {
                        k: v
                        for k, v in item.arguments.items()
                        if not isinstance(v, torch.Tensor) and k != "EARLY"
                    },
                )
                for item in seen
            ]
        )
    return found


def assert_every_part_launches_alike(call) -> None:
    """So that a kernel's tests need not be run for several parts."""
    first, *others = launches(call)
    assert first
    assert all(other == first for other in others)
