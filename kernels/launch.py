"""The one place that launches kernels, and for which GPU and from which table they are chosen.

Tiles are a pure function of the GPU, the op, its dtypes and its shape, so they can be tested and
compiled without one: those of the GPU's tuned table (`tables.py`), or else of the heuristics beside
each kernel. For one GPU and op every choice has the same rows a tile, the same warps and the same
matrix instruction: a row is computed by the same sums whatever the batch around it.
What grows with the batch is marked `do_not_specialize` in the kernels, so that no batch size has
one compiled anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

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


@dataclass(frozen=True)
class Launch:
    """One launch as a hook sees it: the kernel, its arguments by name, and compiler options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


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


def gpu_of(tensor: Tensor) -> Gpu:
    """What kernels on `tensor` are chosen for."""
    return _chosen_for(tensor.device)


def _chosen_for(device: torch.device) -> Gpu:
    chosen = _chosen.get()
    if chosen is not None:
        return chosen[0]
    return _gpu_of(device) if device.type == "cuda" else INTERPRETED


@cache
def _gpu_of(device: torch.device) -> Gpu:
    """A CUDA device's generation, with as many processors as this very device has."""
    found = torch.cuda.get_device_properties(device)
    gpu = gpu_of_capability(found.major, found.minor)
    return replace(gpu, processors=found.multi_processor_count)


def is_interpreted() -> bool:
    """Whether Triton was told to run kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    device: torch.device,
    options: dict[str, Any],
    **arguments: Any,
) -> None:
    """Runs `kernel` on the caller's current stream of `device`; its EARLY is set here.

    Args:
        grid: programs along each axis; nothing runs if one is 0.
        options: num_warps, num_stages and other options of the compiler.
        arguments: the kernel's, by name.

    Raises:
        ValueError: CPU tensors while kernels are compiled for a GPU.
    """
    hook = current_hook()
    early = _chosen_for(device).starts_early and (device.type == "cuda" or hook is not None)
    arguments["EARLY"] = early
    options = {"enable_fp_fusion": True, **options} | ({"launch_pdl": True} if early else {})
    if hook is not None:
        hook(Launch(kernel, arguments, options, grid))
        return
    if 0 in grid:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
        return
    if device.type != "cpu" or not is_interpreted():
        raise ValueError(
            f"Triton kernels run on CUDA tensors, got {device}; set TRITON_INTERPRET=1 before "
            "Triton is imported to interpret them on the CPU"
        )
    kernel[grid](**arguments, **options)


def describable(*matrices: Tensor) -> bool:
    """Whether TMA can address these 2-D or 3-D tensors: rows at multiples of 16 bytes."""
    for tensor in matrices:  # at every launch: generators would take three times as long
        *steps, last = tensor.stride()
        if last != 1 or tensor.data_ptr() % 16:
            return False
        size = tensor.itemsize
        for step in steps:
            if step * size % 16:
                return False
    return True


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of `tensor` for blocks of the shape `block`."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
