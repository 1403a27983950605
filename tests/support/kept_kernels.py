"""Whether the kernel that a plan has kept is the one that Triton would take, launch by launch.

Run as a program: Triton must not interpret here. Nothing is compiled, and nothing runs: what is
compared is which of Triton's kernels is asked to.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from jit_keys import Driver
from triton import knobs
from triton.runtime import driver

from stellar_fast import kernels
from stellar_fast.kernels import launch
from stellar_fast.kernels.tables import Table, Tile

BF16, FP32 = torch.bfloat16, torch.float32


class Current(Driver):
    """Parts, of which each is two devices."""

    elsewhere = False

    def get_current_device(self) -> int:
        return 1000 * self.elsewhere + self.target.arch


class Kernel:
    """Stands for a compiled kernel; knows how often it was started, and by whom."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.kept = self.dispatched = 0
        self.values: tuple = ()

    def launch_metadata(self, *_) -> None: ...

    def run(self, x, y, z, stream, function, metadata, more, enter, leave, *values) -> None:
        self.dispatched += 1
        self.values = (x, y, z), *values

    def __getitem__(self, grid):
        def started(*values) -> None:
            self.kept += 1
            self.values = grid, *values

        return started


def memory(*shape: int, dtype=BF16, offset: int = 0) -> torch.Tensor:
    """Starts `offset` numbers past a multiple of 64 bytes."""
    count = torch.Size(shape).numel()
    return torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)


def calls() -> dict[tuple[int, str], Callable[[], Any]]:
    """By a name: a call of an op, and the part it is on."""
    x, weight, bias = memory(2, 9, 64), memory(128, 64), memory(128)
    residual, sums = memory(2, 9, 128), memory(3, 2, 9, dtype=FP32)
    wide = memory(2, 9, 3 * 64)
    linear, both = kernels.linear, kernels.linear_residual
    found: dict[tuple[int, str], Callable[[], Any]] = {}
    for arch in (80, 90):
        found |= {
            (arch, "product"): lambda: linear(x, weight, bias),
            (arch, "other values"): lambda: linear(x + 1, weight, bias),
            (arch, "bias off the grid"): lambda: linear(x, weight, memory(128, offset=1)),
            (arch, "x off the grid"): lambda: linear(memory(2, 9, 64, offset=1), weight, bias),
            (arch, "weight off the grid"): lambda: linear(x, memory(128, 64, offset=3), bias),
            (arch, "float16"): lambda: linear(x.half(), weight.half(), bias.half()),
            (arch, "bias of float32"): lambda: linear(x, weight, bias.float()),
            (arch, "rows apart"): lambda: linear(wide[..., :64], weight, bias),
            (arch, "columns apart"): lambda: linear(wide[..., ::3], weight, bias),
            (arch, "more rows"): lambda: linear(x.repeat(5, 1, 1), weight, bias),
            (arch, "one row"): lambda: linear(x[:1, :1], weight, bias),
            (arch, "fewer columns"): lambda: linear(x, weight[:16], bias[:16]),
            (arch, "gelu"): lambda: linear(x, weight, bias, gelu=True),
            (arch, "norm"): lambda: linear(x, weight, bias, norm_eps=1e-5, sums=sums),
            (arch, "quantized"): lambda: linear(x, weight, bias, out_scale=0.5),
            (arch, "another scale"): lambda: linear(x, weight, bias, out_scale=0.25),
            (arch, "residual"): lambda: both(x, weight, bias, residual),
            (arch, "residual, bias of float32"): lambda: both(x, weight, bias.float(), residual),
            (arch, "residual of float32"): lambda: both(x, weight, bias, residual.float()),
            (arch, "attention"): lambda: kernels.attention(wide[..., :64], wide[..., 64:], 1),
            (arch, "heads"): lambda: kernels.attention(wide[..., :64], wide[..., 64:], 2),
            (arch, "query alone"): lambda: kernels.attention(x, wide[..., 64:], 1),
            (arch, "keys off the grid"): lambda: kernels.attention(x, wide[..., 1:129], 1),
            (arch, "norms"): lambda: kernels.norm(x, bias[:64], bias[64:], 1e-5, (9,), FP32),
            (arch, "norms in bfloat16"): lambda: kernels.norm(
                x, bias[:64], bias[64:], 1e-5, (9,), BF16
            ),
            (arch, "weights of float32"): lambda: kernels.norm(
                x, bias[:64].float(), bias[64:], 1e-5, (9,), FP32
            ),
            (arch, "norms of parts"): lambda: kernels.norm(
                x[:, 1:], bias[:64], bias[64:], 1e-5, (1, 7), BF16
            ),
            (arch, "rows quantized"): lambda: kernels.quantize_rows(x, 1e-5),
            (arch, "mixture"): lambda: kernels.reassemble(x[:, :8, :8], x[:, :8]),
        }
    return found


def main() -> None:
    compiled: list[Kernel] = []

    def compile_nothing(*_, **__) -> Kernel:
        compiled.append(Kernel())
        return compiled[-1]

    triton.compile = triton.compiler.compile = compile_nothing
    current = Current(90)
    driver.set_active(current)
    wrong: list[tuple[int, str]] = []
    dispatched: list[tuple[int, str]] = []

    def start(item: launch.Launch) -> None:
        own = item.kernel.warmup(grid=item.grid, **item.arguments, **item.options)
        before = own.dispatched + own.kept, own.dispatched
        item.plan.start(item)
        if (own.dispatched + own.kept, own.values) != (
            before[0] + 1,
            ((*item.grid, 1, 1)[:3], *item.values),
        ):
            wrong.append(name)
        if own.dispatched > before[1]:
            dispatched.append(name)

    turns = {}
    narrow = launch.tuned_by(Table(linear={("bf16", 128, 64): ((1, Tile(64, 64, 64, 4, 2)),)}))
    for turn in ("first", "second", "tuned", "third", "debug"):
        with contextlib.ExitStack() as stack:
            if turn == "tuned":
                stack.enter_context(narrow)
            if turn == "debug":
                knobs.runtime.debug = True
            for name, call in calls().items():
                current.target = Driver(name[0]).target
                with launch.on_gpu(name[0], start):
                    call()
            # Tensors of another device, though their memory is none.
            current.elsewhere, name = True, (90, "another device")
            with launch.on_gpu(90, start), torch.device("meta"):
                calls()[90, "product"]()
            current.elsewhere = False
            turns[turn], dispatched[:] = len(dispatched), []
    print(json.dumps({"wrong": wrong, "dispatched": turns, "kernels": len(compiled)}))


if __name__ == "__main__":
    main()
