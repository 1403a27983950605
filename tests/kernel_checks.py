"""What the kernels' tests share: where they run, poisoned memory, and the error budget.

Without a GPU, kernels run in Triton's interpreter on CPU tensors, in float32 and float16: its bf16
products are wrong. With one, the same tests run compiled, bf16 included.
"""

import contextlib
from collections.abc import Iterator

import interpreter_casts
import pytest
import torch
from budgets import assert_within_budget as assert_budget
from stellar_fast.kernels import launch
from stellar_fast.reference import ops as oracles

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    interpreter_casts.install()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# Pointers and registers, or TMA descriptors: the two ways that kernels reach memory.
PARTS = [None] if ON_GPU else [80, 90]


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
def on_part(arch: int | None) -> Iterator[None]:
    """The launch table of `arch`; None is the device's own."""
    with contextlib.nullcontext() if arch is None else launch.on_part(arch):
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Fills the memory that launchers allocate with NaN: what a kernel leaves out is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(tensor):
        if tensor.dtype.is_floating_point:
            tensor.view(torch.uint8).fill_(255)  # all ones is NaN in every float format
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def cast(value, dtype: torch.dtype, device: torch.device = DEVICE):
    """Tensors of float64 to `dtype`, every tensor to `device`; dtypes to `dtype`."""
    if isinstance(value, torch.dtype):
        return dtype
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.dtype == torch.float64 else value.dtype)
    return value


def assert_within_budget(kernel, *arguments, dtype: torch.dtype, **keywords) -> None:
    """`kernel` against the oracle of its name, on arguments drawn in float64.

    Float64 sees the numbers after they were rounded to the dtype under test.
    """
    oracle = getattr(oracles, kernel.__name__)

    def run(function, wide: torch.dtype) -> list[torch.Tensor]:
        rounded = [cast(value, dtype) for value in arguments]
        options = {name: cast(value, dtype) for name, value in keywords.items()}
        if wide == torch.float64:
            rounded = [_widened(value) for value in rounded]
            options = {name: _widened(value) for name, value in options.items()}
        result = function(*rounded, **options)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    results = run(kernel, dtype), run(oracle, dtype), run(oracle, torch.float64)
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert_budget(ours, plain, exact, dtype)


def _widened(value):
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value
