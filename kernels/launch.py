"""How kernels are launched: which tiles, on which part, and the one place that launches them.

Tiles are a pure function of the part, the op, its dtypes and its shape, so they can be tested and
compiled without a GPU: those of the part's tuned table (`tables.py`), or else of the heuristics
here. Within one part and op every choice has the same rows a tile, the same warps and the same
matrix instruction: a row is computed by the same sums whatever the batch around it.
What grows with the batch is marked `do_not_specialize` in the kernels, so that no batch size has
one compiled anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .tables import AttentionTile, Table, Tile, table

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
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
class Part:
    """What the launch table knows of a GPU generation.

    Attributes:
        arch: compute capability times ten, as the compiler counts.
        processors: streaming multiprocessors of its usual product; steers tile sizes only.
        shared: bytes of shared memory that one program may have.
        descriptors: whether matrices are read and written through TMA descriptors.
    """

    arch: int
    processors: int
    shared: int
    descriptors: bool


PARTS = {
    80: Part(80, 108, 166_912, descriptors=False),
    89: Part(89, 142, 101_376, descriptors=False),
    90: Part(90, 132, 232_448, descriptors=True),
    100: Part(100, 148, 232_448, descriptors=True),
    120: Part(120, 170, 101_376, descriptors=True),
}
INTERPRETED = PARTS[90]  # the part whose kernels the interpreter runs, unless told otherwise


@dataclass(frozen=True)
class Launch:
    """One launch as a hook sees it: the kernel, its arguments by name, and compiler options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class _Override:
    part: Part
    hook: Callable[[Launch], None] | None


_tuned: ContextVar[Table | None] = ContextVar("tuned_table", default=None)
_override: ContextVar[_Override | None] = ContextVar("kernel_launches", default=None)


@contextlib.contextmanager
def on_part(arch: int, hook: Callable[[Launch], None] | None = None) -> Iterator[None]:
    """Within it, kernels are chosen for `arch`; with `hook`, launches go to it and nothing runs.

    With a hook, tensors may be on the meta device: that is how the audit sees every launch that an
    engine would make on a part that is not there.
    """
    token = _override.set(_Override(PARTS[arch], hook))
    try:
        yield
    finally:
        _override.reset(token)


@contextlib.contextmanager
def tuned_by(other: Table) -> Iterator[None]:
    """Within it, tiles are those of `other` and not of the part's own table."""
    token = _tuned.set(other)
    try:
        yield
    finally:
        _tuned.reset(token)


def _table(part: Part) -> Table:
    other = _tuned.get()
    return table(part.arch) if other is None else other


def part_of_capability(major: int, minor: int) -> Part:
    """The table's part for a compute capability.

    Raises:
        ValueError: older than sm_80.
    """
    capability = 10 * major + minor
    if capability < 80:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or later, this device has "
            f"{major}.{minor}; load with backend='torch'"
        )
    if capability == 80:
        return PARTS[80]
    known = {8: 89, 9: 90, 10: 100, 11: 100}
    return PARTS[known.get(major, 120)]


def part_of(tensor: Tensor) -> Part:
    """The part that kernels on `tensor` are chosen for."""
    override = _override.get()
    if override is not None:
        return override.part
    if tensor.device.type == "cuda":
        return part_of_capability(*torch.cuda.get_device_capability(tensor.device))
    return INTERPRETED


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
    """Runs `kernel` on the caller's current stream of `device`.

    Args:
        grid: programs along each axis; nothing runs if one is 0.
        options: num_warps, num_stages and other options of the compiler.
        arguments: the kernel's, by name.

    Raises:
        ValueError: CPU tensors while kernels are compiled for a GPU.
    """
    options = {"enable_fp_fusion": True, **options}
    override = _override.get()
    if override is not None and override.hook is not None:
        override.hook(Launch(kernel, arguments, options, grid))
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
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(step * tensor.element_size() % 16 == 0 for step in tensor.stride()[:-1])
        for tensor in matrices
    )


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of `tensor` for blocks of the shape `block`."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def linear_options(
    tile: Tile, x: torch.dtype, descriptors: bool, quantizes: bool
) -> dict[str, int]:
    """Options of the compiler for a product; `quantizes` its output to FP8.

    Left to itself, the assembler caps the registers so low that it spills: in that epilogue, and
    where float32 operands come by pointers.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if quantizes and tile.block_n <= 128:
        options["maxnreg"] = 128
    if x == torch.float32 and not descriptors:
        options["maxnreg"] = 160
    return options


def linear_tile(part: Part, x: torch.dtype, rows: int, columns: int, depth: int) -> Tile:
    """The tile of a matrix product (rows, depth) x (depth, columns): tuned, or by heuristics.

    Wide tiles read less, narrow ones leave no processor without work. All have the same rows, warps
    and instruction: see the module's text.
    """
    tuned = _table(part).linear_tile(NAMES.get(x, ""), rows, columns, depth)
    if tuned is not None:
        return tuned
    if x == torch.float32:
        return Tile(128, 64, 16, num_warps=8, num_stages=2)
    deep = 128 if x == FP8 else 64
    promote = x == FP8 and depth > 2048
    if part.shared < 200_000:
        # Half the shared memory, and accumulators in registers: no 256-wide tile.
        wide = Tile(128, 128, deep // 2, num_warps=8, num_stages=3, slices=2, promote=promote)
        narrow = Tile(128, 64, deep // 2, num_warps=8, num_stages=4, promote=promote)
        fills = -(-rows // 128) * -(-columns // 128) >= part.processors
        return wide if fills else narrow
    choices = [
        Tile(128, 128, deep, num_warps=8, num_stages=4, slices=2, promote=promote),
        Tile(128, 64, deep, num_warps=8, num_stages=4, promote=promote),
    ]
    if not promote:  # a second accumulator would not fit into the registers
        choices.insert(0, Tile(128, 256, deep, num_warps=8, num_stages=3, slices=2))
    return min(choices, key=lambda tile: _cycles(part, tile, rows, columns, depth * x.itemsize))


def _cycles(part: Part, tile: Tile, rows: int, columns: int, row_bytes: int) -> float:
    """What decides between tiles of a product: reading operands, and finishing tiles.

    A processor reads 64 bytes a cycle from the cache, which gives all of them 34 each, as
    `benchmarks/audit/predict.py` has it; what a tile takes beside its reading grows with its
    columns, and 32 cycles each come within 2 % of the best choices that it predicts.
    """
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    read = (tile.block_m + tile.block_n) * row_bytes
    busiest = -(-tiles // part.processors) * (read / 64 + 32 * tile.block_n)
    return max(busiest, tiles * read / (34 * part.processors))


def attention_tile(
    part: Part, dtype: torch.dtype, length: int, head_dim: int, descriptors: bool
) -> AttentionTile:
    """The tile of attention over `length` keys: tuned, or by heuristics.

    Keys and values stay in shared memory only where TMA brings them there: through registers, as
    pointers would, they spill.
    """
    stays = descriptors
    if part.arch == 100 and TRITON < (3, 8) and head_dim.bit_count() > 1:
        # Every product of a head in two pieces would have tensor memory of its own, which these
        # versions run out of without an error: the kernel they make is a trap.
        stays = False
    tuned = _table(part).attention.get((NAMES.get(dtype, ""), length, head_dim))
    if tuned is not None and (stays or not tuned.resident):
        return tuned
    if dtype == torch.float32:
        # Left to itself, the assembler gives so few registers that it spills.
        return AttentionTile(32, 32, num_warps=4, num_stages=1, resident=False, registers=128)
    kept = -(-length // 16) * 16 * head_dim * 2 * 2
    if stays and part.shared > 200_000 and kept <= part.shared // 2:
        # One stage: with the next query rows on their way, fewer programs would fit side by side.
        return AttentionTile(64, 64, num_warps=4, num_stages=1, resident=True)
    return AttentionTile(64, 64, num_warps=4, num_stages=2, resident=False)


def patch_embed_tile(weight: torch.dtype) -> Tile:
    """The tile of patch_embed, the same on every part and for every batch."""
    if weight == torch.float32:
        return Tile(64, 64, 16, num_warps=8, num_stages=2)
    return Tile(128, 128, 32, num_warps=8, num_stages=3, slices=2)


def patch_embed_options(tile: Tile, weight: torch.dtype) -> dict[str, int]:
    """Options of the compiler for patch_embed; see `linear_options` for the registers."""
    registers = 128 if weight == torch.float32 else 255
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": registers}


def spatial_map_options(tile: Tile, weight: torch.dtype) -> dict[str, int]:
    """Options of the compiler for spatial_map's product; see `linear_options`."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {**options, "maxnreg": 128} if weight == torch.float32 else options


def spatial_map_tile(weight: torch.dtype) -> Tile:
    """The tile of spatial_map's product, the same on every part and for every batch."""
    if weight == torch.float32:
        return Tile(64, 32, 16, num_warps=8, num_stages=2)
    return Tile(64, 128, 32, num_warps=8, num_stages=3)


def reassemble_tile(tokens: int) -> Tile:
    """block_m patches x block_n columns of a mixture of tokens, block_k of them with padding.

    The more tokens, the fewer patches: all operands of an exact product are in the registers.
    """
    padded = max(16, 1 << (tokens - 1).bit_length())
    if padded > 32:
        return Tile(16, 32, padded, num_warps=4, num_stages=1)
    return Tile(32 if padded == 16 else 16, 128, padded, num_warps=4, num_stages=1)
