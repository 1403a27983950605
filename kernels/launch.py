"""The one place that launches kernels, and for which GPU and from which table they are chosen.

Tiles are a pure function of the GPU, the op, its dtypes and its shape, so they can be tested and
compiled without one: those of the GPU's tuned table (`tables.py`), or else of the heuristics beside
each kernel. For one GPU and op every choice has the same rows a tile, the same warps and the same
matrix instruction: a row is computed by the same sums whatever the batch around it.
What grows with the batch is marked `do_not_specialize` in the kernels, so that no batch size has
one compiled anew.

An op makes a `Plan` of what a launch is by shapes, strides and dtypes, and keeps it for the next
call; a plan keeps what Triton compiled for it, by what Triton looks at in a tensor. A second launch
asks neither for tiles nor Triton for the kernel, which took seven tenths of its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .gpus import GPUS, INTERPRETED, Gpu, gpu_of_capability
from .tables import Table, table

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
FP8 = torch.float8_e4m3fn
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    FP8: "fp8",
}  # of dtypes, in tables
FP8_MAX = 448.0  # largest finite e4m3 number
SUM_BLOCK = 64  # columns in one partial sum of squares, whatever the tile


class Launch(NamedTuple):  # of all that has fields, what is soonest made
    """One launch: a plan, the kernel's arguments in order, and what decides its compiled kernel."""

    plan: Plan
    values: list[Any]
    key: Key

    @property
    def kernel(self) -> Any:
        return self.plan.kernel

    @property
    def arguments(self) -> dict[str, Any]:
        """The kernel's, by name."""
        return dict(zip(self.plan.kernel.arg_names, self.values, strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler."""
        return self.plan.options

    @property
    def grid(self) -> tuple[int, ...]:
        return self.plan.grid


Key = tuple[Any, ...]
Hook = Callable[[Launch], None]

_tuned: ContextVar[Table | None] = ContextVar("tuned_table", default=None)
_chosen: ContextVar[tuple[Gpu, Hook | None] | None] = ContextVar("kernel_launches", default=None)


@contextlib.contextmanager
def on_gpu(gpu: Gpu | int, hook: Hook | None = None) -> Iterator[None]:
    """Within it, kernels are chosen for `gpu`; with `hook`, launches go to it and nothing runs.

    With a hook, tensors may be on the meta device: that is how the audit sees every launch that an
    engine would make on a GPU that is not there.

    Args:
        gpu: or its `arch`.
    """
    token = _chosen.set((GPUS[gpu] if isinstance(gpu, int) else gpu, hook))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_hook() -> Hook | None:
    """The hook of the innermost `on_gpu`."""
    chosen = _chosen.get()
    return None if chosen is None else chosen[1]


@contextlib.contextmanager
def tuned_by(other: Table) -> Iterator[None]:
    """Within it, tiles are those of `other` and not of the GPU's own table."""
    token = _tuned.set(other)
    try:
        yield
    finally:
        _tuned.reset(token)


def table_of(gpu: Gpu) -> Table:
    """The launch table that tiles for `gpu` are looked up in."""
    other = _tuned.get()
    return table(gpu.arch) if other is None else other


@dataclass(frozen=True, eq=False)
class Target:
    """What plans are made for: one object for each, by which they are soon found.

    Attributes:
        early: whether a launch may start before the one before it has ended.
    """

    gpu: Gpu
    early: bool
    table: Table


def target_of(device: torch.device) -> Target:
    """What launches on tensors of `device` are planned for, here and now."""
    gpu, hook = _chosen.get() or (None, None)
    if gpu is None:
        gpu = _gpu_of(device) if device.type == "cuda" else INTERPRETED
    early = gpu.starts_early and (device.type == "cuda" or hook is not None)
    return _target(gpu, early, table_of(gpu))


_target = lru_cache(maxsize=256)(Target)


@cache
def _gpu_of(device: torch.device) -> Gpu:
    """A CUDA device's generation, with as many processors as this very device has."""
    found = torch.cuda.get_device_properties(device)
    gpu = gpu_of_capability(found.major, found.minor)
    return replace(gpu, processors=found.multi_processor_count)


def gpu_of(tensor: Tensor) -> Gpu:
    """What kernels on `tensor` are chosen for."""
    return target_of(tensor.device).gpu


def is_interpreted() -> bool:
    """Whether Triton was told to run kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a TMA descriptor reads a tensor: as this shape with these strides, in blocks."""

    shape: list[int]
    strides: list[int]
    block: list[int]

    def of(self, tensor: Tensor) -> TensorDescriptor:
        """The descriptor; what Triton would check at every launch is the plan's to know."""
        made = object.__new__(TensorDescriptor)
        made.base, made.shape = tensor, self.shape
        made.strides, made.block_shape = self.strides, self.block
        return made


class Plan:
    """Launches that differ in the memory of their tensors alone.

    Args:
        grid: programs along each axis; nothing runs if one is 0.
        options: num_warps, num_stages and other options of the compiler.
        constants: the kernel's arguments that are no tensors, by name, but for EARLY.
        layouts: of those that it takes as descriptors, for tensors that are `aligned`.
    """

    def __init__(
        self,
        target: Target,
        kernel: Any,
        grid: tuple[int, ...],
        options: Mapping[str, Any],
        constants: Mapping[str, Any],
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.options = {"enable_fp_fusion": True, **options}
        if target.early:
            self.options["launch_pdl"] = True
        self.layouts = layouts or {}
        given = {**constants, "EARLY": target.early}
        self._values = [given.get(name) for name in kernel.arg_names]
        self._operands = [
            (index, name, self.layouts.get(name))
            for index, name in enumerate(kernel.arg_names)
            if name not in given
        ]
        self._axes = (*grid, 1, 1)[:3]
        self._compiled: dict[Key, Any] = {}

    def bound(self, device: torch.device, operands: dict[str, Tensor | None]) -> Launch:
        """The launch on these tensors, by name.

        Raises:
            TypeError: they are not the kernel's.
        """
        values: list[Any] = self._values.copy()
        key: list[Any] = [device]
        try:
            for index, name, layout in self._operands:
                tensor = operands[name]
                if tensor is None:
                    key.append(None)
                    continue
                # What Triton compiles for differs by the dtype, and by the alignment of a pointer.
                key.append(tensor.dtype)
                if layout is None:
                    key.append(tensor.data_ptr() % 16 == 0)
                    values[index] = tensor
                else:
                    values[index] = layout.of(tensor)
        except KeyError as error:
            raise TypeError(f"{self.kernel.__name__} needs {error}") from None
        if len(operands) != len(self._operands):
            names = sorted(operands.keys() - {name for _, name, _ in self._operands})
            raise TypeError(f"{self.kernel.__name__} takes no {', '.join(names)}")
        return Launch(self, values, tuple(key))

    def start(self, launch: Launch) -> None:
        """Starts it on the current device and stream."""
        plain = not (knobs.runtime.debug or knobs.compilation.instrumentation_mode)
        compiled = self._compiled.get(launch.key) if plain else None
        if compiled is not None:
            compiled[self._axes](*launch.values)
            return
        compiled = self.kernel[self.grid](*launch.values, **self.options)
        if plain and compiled is not None:
            self._compiled[launch.key] = compiled


# A plan is a function of its arguments: shapes, strides, dtypes, numbers, and what it is for.
planned = lru_cache(maxsize=512)


def launch(plan: Plan, device: torch.device, **operands: Tensor | None) -> None:
    """Runs a kernel on the caller's current stream of `device`.

    Args:
        operands: its tensors, by name.

    Raises:
        ValueError: CPU tensors while kernels are compiled for a GPU.
    """
    made = plan.bound(device, operands)
    hook = current_hook()
    if hook is not None:
        hook(made)
    elif 0 in plan.grid:
        return
    elif device.type == "cuda":
        if torch.cuda.current_device() == device.index:
            plan.start(made)
        else:
            with torch.cuda.device(device):
                plan.start(made)
    elif device.type == "cpu" and is_interpreted():
        plan.kernel[plan.grid](*made.values, **plan.options)
    else:
        raise ValueError(
            f"Triton kernels run on CUDA tensors, got {device}; set TRITON_INTERPRET=1 before "
            "Triton is imported to interpret them on the CPU"
        )


def aligned(*tensors: Tensor) -> bool:
    """Whether all start at multiples of 16 bytes, as TMA needs it."""
    addresses = 0
    for tensor in tensors:  # at every launch: a generator would take three times as long
        addresses |= tensor.data_ptr()
    return addresses % 16 == 0


def describable(strides: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether TMA can address a matrix of these strides: rows at multiples of 16 bytes."""
    *steps, last = strides
    return last == 1 and all(step * dtype.itemsize % 16 == 0 for step in steps)
