"""Kernels with one fault each, for the audit to name. Run as a program: prints what it found.

In a process of its own, since Triton must not interpret here; the keys of jit_keys.py are compared
in it too. With an argument, `all`: sound kernels on every part, and the keys of every precision.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from audit.compilation import Compilation, Finding, compile_one
from audit.run import collect, families
from jit_keys import compared

from stellar_fast.kernels.gpus import GPUS
from stellar_fast.kernels.launch import tuned_by
from stellar_fast.kernels.tables import Table, Tile


@triton.jit
def sound(x_ptr, y_ptr, out_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * width
    at = i[:, None] * BLOCK + i[None, :]
    product = tl.dot(tl.load(x_ptr + row + at), tl.load(y_ptr + at))
    tl.store(out_ptr + row + at, product.to(out_ptr.dtype.element_ty))


@triton.jit
def narrow_offset(x_ptr, y_ptr, out_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * width
    at = i[:, None] * BLOCK + i[None, :]
    product = tl.dot(tl.load(x_ptr + row + at), tl.load(y_ptr + at))
    tl.store(out_ptr + row + at, product.to(out_ptr.dtype.element_ty))


@triton.jit
def wide_constant(x_ptr, y_ptr, out_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * 5120
    at = i[:, None] * BLOCK + i[None, :]
    product = tl.dot(tl.load(x_ptr + row + at), tl.load(y_ptr + at))
    tl.store(out_ptr + row + at, product.to(out_ptr.dtype.element_ty))


@triton.jit
def empty(x_ptr, y_ptr, out_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at))


@triton.jit
def rounded(x_ptr, y_ptr, out_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    product = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at), input_precision="tf32")
    tl.store(out_ptr + at, product)


def planted(function, arch=90, pointer="*fp16", block=64, warps=4, **options) -> list[str]:
    """The faults found in one kernel."""
    pointers = ("x_ptr", "y_ptr", "out_ptr")
    signature = [(name, pointer) for name in pointers]
    signature += [("width", "i32"), ("BLOCK", "constexpr")]
    item = Compilation(
        arch=arch,
        kernel=(__name__, function.fn.__name__),
        signature=tuple(signature),
        constants=(("BLOCK", block),),
        divisible=pointers,
        options=tuple(sorted({"num_warps": warps, "num_stages": 2, **options}.items())),
    )
    return list(compile_one(item, GPUS[arch].shared).faults)


def differing_tiles() -> list[str]:
    """The complaint about a family in which one tile has other rows and warps."""
    items = [
        Compilation(
            arch=80,
            kernel=("stellar_fast.kernels.linear", "_linear_kernel"),
            signature=(("x", "tensordesc<bf16[128,64]>"),),
            constants=(("BLOCK_M", rows), ("CHUNKS", 1)),
            divisible=(),
            options=(("num_warps", rows // 16),),
        )
        for rows in (128, 64)
    ]
    finding = Finding(99, 0, 0, 0, 1, ("HGMMA.64x128x16.F32.BF16",), (), None)
    assert families(items[:1], [finding]) == []
    return families(items, [finding, finding])


def badly_tuned() -> list[str]:
    """The faults of a tile that a tuned table asks for: half the warps that its registers need."""
    tile = Tile(128, 256, 64, num_warps=4, num_stages=2)
    with tuned_by(Table(linear={("bf16", 3840, 1280): ((1, tile),)})):
        items = collect([90], ["stellar-h16"], ["bf16"])
    (asked,) = (
        item for item in items if item.value("BLOCK_N") == 256 and ("num_warps", 4) in item.options
    )
    return list(compile_one(asked, GPUS[90].shared).faults)


def faults() -> dict[str, list[str]]:
    return {
        "sound": planted(sound),
        "narrow_offset": planted(narrow_offset),
        "wide_constant": planted(wide_constant),
        "empty": planted(empty),
        "spilling": planted(sound, block=128, warps=4, maxnreg=96),
        "hopeless": planted(sound, block=128, warps=4, maxnreg=32),
        "too_much_shared": planted(sound, arch=120, pointer="*fp32", block=128, warps=8),
        "rounded": planted(rounded, pointer="*fp32"),
        "small_products": planted(sound, block=32),
        "differing": differing_tiles(),
        "badly_tuned": badly_tuned(),
    }


def main() -> None:
    points = [(80, "fp32"), (90, "fp8")]
    if "all" in sys.argv:
        found = {f"sound_{arch}": planted(sound, arch) for arch in GPUS}
        points = [(80, "fp32"), (80, "bf16"), (90, "fp32"), (90, "bf16"), (90, "fp8")]
    else:
        found = faults()
    print(json.dumps({"faults": found, "keys": compared("stellar-h16", points)}))


if __name__ == "__main__":
    main()
