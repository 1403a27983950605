"""What a call costs the host where the device does nothing: `encode` by a graph, and a launch.

    python -P benchmarks/host_cost.py [--against TREE]

The engine is the real one, its graphs and kernels are not there: a graph replays nothing, a launch
goes to a hook, or on to Triton, whose kernels are compiled of nothing and start nothing; tensors
are on the CPU and of one small image. Microseconds of the CPU's time, not of the clock; what the
driver, Triton's launcher and CUDA's allocator take comes on top.

With `--against`, the same is measured of another checkout, in turns with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before Triton is imported
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import torch
import triton
from audit.run import encoder_of, shallow
from gpu.run import linked
from harness.results import ROOT
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from stellar_fast import kernels
from stellar_fast.config import MODELS
from stellar_fast.engine import encoder
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.engine.engine import Engine
from stellar_fast.engine.graphs import GraphRunner
from stellar_fast.kernels import launch
from stellar_fast.weights.packed import map_nodes

ARCH = 90
ROUNDS, CALLS = 15, 200
TURNS = 3  # of processes


class Still:
    """A recorder whose graphs do nothing."""

    device = torch.device("cpu")

    def is_capturing(self) -> bool:
        return False

    def record(self, function: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], Any]:
        return (lambda: None), function()

    def wait(self) -> None: ...

    def done(self) -> None: ...

    def finish(self) -> None: ...

    def forget(self) -> None: ...


class Device:
    """As much of a GPU as Triton asks for before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def uncompiled(*_: Any, **__: Any) -> Any:
    """A compiled kernel as Triton has it, of nothing, whose launcher does nothing."""
    kernel: Any = object.__new__(CompiledKernel)
    kernel.src = kernel.name = kernel.function = kernel.packed_metadata = kernel._module_pid = None
    kernel.module, kernel._run = object(), lambda *_: None
    return kernel


def compile_nothing() -> None:
    """From here on, Triton launches on `Device` what is `uncompiled`."""
    triton.compile = triton.compiler.compile = uncompiled
    driver.set_active(Device())


def start(item: Any) -> None:
    """What a launch does on a GPU, of this checkout or of one before plans."""
    if hasattr(item, "plan"):
        item.plan.start(item)
    else:
        item.kernel[item.grid](**item.arguments, **item.options)


def with_graphs(engine: Engine) -> Engine:
    """`engine`, which then replays graphs that do nothing."""
    engine._graphs = GraphRunner(
        Still(), engine.max_batch, engine.output_dtype, lambda error: False, 1 << 40
    )
    return engine


def microseconds(call: Callable[[], object]) -> float:
    """Of the CPU, for one call."""
    taken = []
    for _ in range(3 * CALLS):
        call()
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        taken.append(time.process_time() - start)
    return 1e6 * statistics.median(taken) / CALLS


def costs() -> dict[str, float]:
    """Microseconds by what they are for."""
    torch.set_num_threads(1)
    config = shallow(MODELS["stellar-b16"])
    meta = encoder_of(config, "bf16")
    weights = map_nodes(meta, Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"))
    engine = with_graphs(
        Engine(
            config,
            weights,
            None,
            device=torch.device("cpu"),
            precision="bf16",
            output_dtype=torch.float32,
            max_batch=16,
            weights="zeros",
        )
    )
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    engine.warm_up(sizes=((32, 32),)).warm_up(sizes=((32, 32),), outputs=("cls",))
    found = {
        "encode, five outputs": microseconds(lambda: engine.encode(images)),
        "encode, cls alone": microseconds(lambda: engine.encode(images, outputs=("cls",))),
    }
    table = weights.table.table(2, 2)
    seen: list[launch.Launch] = []

    def forward() -> None:
        encoder.encode(kernels, weights, config, images, table, OUTPUTS, torch.float32)

    with torch.no_grad(), launch.on_gpu(ARCH, seen.append):
        forward()
    with torch.no_grad(), launch.on_gpu(ARCH, lambda _: None):
        found["launch"] = microseconds(forward) / len(seen)
    if not launch.is_interpreted():
        compile_nothing()
        with torch.no_grad(), launch.on_gpu(ARCH, start):
            found["launch, with Triton"] = microseconds(forward) / len(seen)
    return found


def against(tree: Path) -> None:
    """Prints what `tree` takes beside this checkout, in turns."""
    found: dict[Path, list[dict[str, float]]] = {tree.resolve(): [], ROOT: []}
    for _ in range(TURNS):
        for place, rows in found.items():
            with linked(place) as path:
                command = [sys.executable, "-P", __file__, "--json"]
                done = subprocess.run(
                    command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
                )
            if done.returncode:
                raise SystemExit(f"{place}: {done.stderr}")
            rows.append(json.loads(done.stdout))
    theirs, ours = found.values()
    print(f"{'':22}{'theirs':>9}{'this':>9}{'ratio':>8}")
    for name in ours[0]:
        before, now = (statistics.median(row[name] for row in rows) for rows in (theirs, ours))
        print(f"{name:22}{before:>6.1f} us{now:>6.1f} us{now / before:>8.2f}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    options = parser.parse_args(arguments)
    if options.against is not None:
        against(options.against)
        return 0
    found = costs()
    if options.json:
        print(json.dumps(found))
        return 0
    for name, taken in found.items():
        print(f"{name:22}{taken:6.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
