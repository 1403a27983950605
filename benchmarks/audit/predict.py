"""Times predicted from machine code, for GPUs that are not at hand. No figure here is measured.

    python -P benchmarks/audit/predict.py [--arch 90] [--model NAME] [--precision P] [--batch N]

Of every launch of a real forward it takes the tiles, their waves over the multiprocessors and the
bytes that must move, and of its compiled code what a warp issues and waits for in the main loop and
beside it. A tile takes the longest of its matrix products, its instructions, its reads from the
cache and its pipeline's waiting: a pass's memory is free when its products are done and is full a
trip later, in which as many passes go by as are under way. What is beside the main loop adds to
that, with the trips that follow one another there, where one program has the multiprocessor for
itself, and overlaps where several share it. A launch takes no less than its bytes at the memory's
rate.

Rates are those of `CHIPS`. What was measured is beside it in the tables of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before Triton is imported; workers inherit it
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

from audit import run as audit
from audit.compilation import Compilation, Finding
from harness import results
from harness.results import Row
from torch import Tensor

from stellar_fast.config import MODELS, ModelConfig
from stellar_fast.kernels import launch

# Seconds between dependent launches of a CUDA graph, with the last stores' way to the memory: an
# assumption. A norm of one image, three trips, took 2.4 us on an H200.
START = 1.4e-6
# Of a trip to the memory, what one to the cache takes, where what is read beside the main loop has
# been written by the launch before. An assumption.
CACHED = 0.5
# Cycles from an instruction of a warp to its next, where no other warp of its scheduler fills them:
# results are there after four to six, those of the uniform unit after a dozen. On an H200 the fc2
# of one image took 207 to 212 ns a pass of 156 instructions, read by 48 programs as by 100.
ALONE = 2.5
PORT = 64  # bytes a cycle from the cache into one multiprocessor, sm_80 to sm_120
# Bytes a cycle of the boost clock and multiprocessor that the cache gives to all of them at once; a
# load of products does not slow it. On an H200, products of 64 images that read 2.02 GB in tiles of
# 128x256x64 took 260 us, those of one image that read 131 MB 17 us: 7.7 TB/s both.
CACHE = 30


@dataclass(frozen=True)
class Chip:
    """What a prediction assumes of a GPU.

    Attributes:
        processors: multiprocessors.
        flops: of one multiprocessor and cycle, bf16 with float32 sums; twice that in FP8.
        boost: cycles a second where matrix products do not draw all the power.
        matrix: FLOP/s of a large bf16 product.
        copy: bytes/s of a device copy, reads and writes together.
        trip: seconds from a load's issue until its bytes from the memory are there.
        source: where the two rates come from.
    """

    name: str
    processors: int
    flops: int
    boost: float
    matrix: float
    copy: float
    trip: float
    source: str

    @property
    def loaded(self) -> float:
        """Cycles a second under a load of matrix products."""
        return self.matrix / (self.processors * self.flops)


# Of an H200's fc2 for one image (tuning at commit ce74130), in tiles whose passes wait for their
# loads: what a pass took times the passes under way, less its products and instructions, is 410 to
# 550 ns with two to four stages. Other GPUs' is the same by assumption: DRAM's has hardly changed.
TRIP = 490e-9
_SHEET = "80 % of the data sheet's dense bf16 rate, 90 % of its bandwidth"
CHIPS = {
    80: Chip("A100 SXM", 108, 2048, 1.41e9, 0.8 * 312e12, 0.9 * 2.04e12, TRIP, _SHEET),
    86: Chip("A40", 84, 1024, 1.74e9, 0.8 * 149.7e12, 0.9 * 0.696e12, TRIP, _SHEET),
    89: Chip("L40S", 142, 1024, 2.52e9, 0.8 * 362e12, 0.9 * 0.864e12, TRIP, _SHEET),
    90: Chip(
        "H200",
        132,
        4096,
        1.98e9,
        790e12,
        4.3e12,
        TRIP,
        "a matrix product and a copy measured on an H200",
    ),
    100: Chip("B200", 148, 8192, 1.85e9, 0.8 * 2250e12, 0.9 * 8.0e12, TRIP, _SHEET),
    120: Chip("RTX 5090", 170, 512, 2.41e9, 0.8 * 209.5e12, 0.9 * 1.79e12, TRIP, _SHEET),
}


@dataclass(frozen=True)
class Work:
    """What a launch has to do.

    Attributes:
        tiles: units that programs work through, and `passes` of the main loop in each.
        products: FLOPs of the matrix products of a tile, padding included.
        read: bytes that a tile reads through the cache.
        flops, moved: of the launch: FLOPs without padding, and bytes of its operands and results.
        alternates: whether products wait for instructions of the same warp, as in a softmax.
        fills: how often a tile's pipeline begins empty, where loops are nested.
    """

    tiles: int
    passes: int
    products: float
    read: float
    flops: float
    moved: float
    alternates: bool = False
    fills: int = 1


def _moved(item: launch.Launch) -> float:
    """Bytes of every operand and result, once."""
    total = 0
    for name, value in item.arguments.items():
        if name == "key_value_b":  # the same memory as key_value_a
            continue
        tensor = getattr(value, "base", value)
        if isinstance(tensor, Tensor):
            total += tensor.numel() * tensor.element_size()
    return total


def work_of(item: launch.Launch) -> Work:
    """What one of the package's launches has to do, by its arguments.

    Raises:
        ValueError: a kernel that is not known here.
    """
    a, programs = item.arguments, 1
    for axis in item.grid:
        programs *= axis
    moved = _moved(item)
    name = item.kernel.fn.__name__
    if name == "_linear_kernel":
        m, n, k = a["M"], a["N"], a["K"]
        steps = -(-k // a["BLOCK_K"])
        size = getattr(a["weight"], "base", a["weight"]).element_size()
        return Work(
            tiles=-(-m // a["BLOCK_M"]) * -(-n // a["BLOCK_N"]),
            passes=steps,
            products=2.0 * a["BLOCK_M"] * a["BLOCK_N"] * steps * a["BLOCK_K"],
            read=(a["BLOCK_M"] + a["BLOCK_N"]) * steps * a["BLOCK_K"] * size,
            flops=2.0 * m * n * k,
            moved=moved,
            fills=a["CHUNKS"],
        )
    if name == "_attention_kernel":
        steps = -(-a["S"] // a["BLOCK_K"])
        keys = steps * a["BLOCK_K"]
        dim = a["DIM_A"] + a["DIM_B"]
        pairs = item.grid[0]
        tiles = pairs * -(-a["Q"] // a["BLOCK_Q"])
        kept = 4.0 * keys * dim  # keys and values, two bytes each
        return Work(
            tiles=tiles,
            passes=steps,
            products=4.0 * a["BLOCK_Q"] * keys * dim,
            read=kept,
            flops=4.0 * a["Q"] * a["S"] * a["HEAD_DIM"] * pairs,
            moved=moved,
            alternates=True,
        )
    if name in ("_patch_embed_kernel", "_similarity_kernel"):
        depth = a["DEPTH"] if "DEPTH" in a else a["D"]
        steps = -(-depth // a["BLOCK_K"])
        if "DEPTH" in a:
            rows = a["rows_out"]
            pixel, weight = a["tiles_ptr"].element_size(), a["weight_ptr"].element_size()
        else:
            rows = a["B"] * a["P"]
            pixel, weight = a["dense_ptr"].element_size(), a["weight_ptr"].element_size()
        return Work(
            tiles=programs,
            passes=steps,
            products=2.0 * a["BLOCK_M"] * a["BLOCK_N"] * steps * a["BLOCK_K"],
            read=steps * a["BLOCK_K"] * (a["BLOCK_M"] * pixel + a["BLOCK_N"] * weight),
            flops=2.0 * rows * depth * a["D"],
            moved=moved,
        )
    if name in (
        "_norm_kernel",
        "_unfold_kernel",
        "_quantize_rows_kernel",
        "_spatial_kernel",
        "_reassemble_kernel",
    ):
        return Work(programs, 1, 0.0, moved / max(1, programs), 0.0, moved)
    raise ValueError(f"no prediction for {name}")


@dataclass(frozen=True)
class Prediction:
    """Seconds, and what they are made of.

    Attributes:
        seconds: the launch, from the end of the one before it.
        floor: the larger of FLOPs at the matrix rate and bytes at the copy's rate.
        waves: tiles for each place that there is for a program.
        products, instructions: seconds that one tile needs of each, alone on a multiprocessor.
        cache: seconds in which the cache gives all tiles what they read.
        waiting: seconds in which a tile's pipeline can have its loads, one program alone.
        trips: seconds of a tile beside its main loop in trips that follow one another.
        bound: which of them, or memory, or starting, sets the time.
    """

    seconds: float
    floor: float
    waves: float
    products: float
    instructions: float
    cache: float
    waiting: float
    trips: float
    bound: str


def predict(
    work: Work, finding: Finding, warps: int, fp8: bool, chip: Chip, clock: float
) -> Prediction:
    """The time of a launch whose code is `finding`, at `clock` cycles a second."""
    anatomy, waits = finding.anatomy, finding.waits
    assert anatomy is not None and waits is not None
    exact = not finding.matrix  # float32 products are instructions like others
    rate = chip.matrix * (2 if fp8 else 1)
    products = 0.0 if exact else work.products / (chip.flops * clock * (2 if fp8 else 1))
    loop = work.passes * anatomy.loop * warps / 4 / clock
    slowly = loop * max(1.0, ALONE * 4 / warps)
    tile = anatomy.tile * warps / 4 / clock
    port = work.read / PORT / clock
    waiting = 0.0
    if waits.under_way is not None:
        pass_alone = chip.trip + (products + slowly) / work.passes
        waiting = work.passes * pass_alone / (1 + waits.under_way)
    waiting += work.passes * waits.each * chip.trip
    trips = waits.after * CACHED * chip.trip
    # A program's first loads; where loops are nested or there is one tile, those of each tile.
    first = chip.trip * (waits.before * CACHED + work.fills * (waits.under_way is not None))
    # The softmaxes of programs side by side have not hidden one another's either: attention took as
    # long for a pass of each with three of them as with one.
    main = products + slowly if work.alternates else max(products, slowly)
    alone = max(main, port, waiting) + tile + trips
    if not anatomy.flattened:
        alone += first
    resident = max(1, finding.programs)
    most = -(-work.tiles // chip.processors)  # tiles of the busiest multiprocessor
    together = main + tile if work.alternates else max(products, loop + tile, port)
    cache = work.tiles * work.read / (CACHE * chip.boost * chip.processors)
    memory = work.moved / chip.copy
    shares = {
        "products": most * products,
        "instructions": most * (loop + tile),
        "cache": max(cache, most * port),
        "memory": memory,
        "waiting": -(-most // resident) * (waiting + trips),
        "start": START,
    }
    last = tile + trips  # of the last tile, when all is read
    busiest = max(most * together, -(-most // resident) * alone, cache + last, memory)
    return Prediction(
        seconds=START + (first if anatomy.flattened else 0.0) + busiest,
        floor=max(0.0 if exact else work.flops / rate, memory),
        waves=work.tiles / (chip.processors * resident),
        products=products,
        instructions=loop + tile,
        cache=cache,
        waiting=waiting,
        trips=trips,
        bound=max(shares, key=lambda name: shares[name]),
    )


def label(item: launch.Launch) -> str:
    """The op as the forward calls it: qkv, attention, proj, fc1, fc2, …"""
    name = item.kernel.fn.__name__.strip("_").removesuffix("_kernel")
    a = item.arguments
    if name != "linear":
        return name
    if a["GELU"]:
        return "fc1"
    if a["RESIDUAL"]:
        return "fc2" if a["K"] > a["N"] else "proj"
    return {1: "sparse_proj", 2: "kv", 3: "qkv"}.get(a["N"] // a["K"], "linear")


def rows_of(
    config: ModelConfig, precision: str, batch: int, chip: Chip, arch: int, workers: int
) -> list[Row]:
    """One row for each kind of launch of a forward, with how often it occurs."""
    seen = audit.forward(config, precision, batch, arch)
    groups: dict[tuple[str, Compilation, tuple], list[launch.Launch]] = {}
    for item in seen:
        shape = tuple(item.arguments.get(key) for key in ("M", "N", "K", "Q", "S"))
        key = (label(item), audit.compilation(item, arch), (*item.grid, *shape))
        groups.setdefault(key, []).append(item)
    found = audit.audit([compilation for _, compilation, _ in groups], workers)
    for (name, _, _), finding in zip(groups, found, strict=True):
        if finding.faults:
            raise ValueError(f"{name} on sm_{arch}: {'; '.join(finding.faults)}")

    def rows(clock: float) -> list[Row]:
        made = []
        for (name, compilation, _), finding, items in zip(
            groups, found, groups.values(), strict=True
        ):
            warps = dict(compilation.options)["num_warps"]
            fp8 = "fp8" in dict(compilation.signature).get("weight", "")
            prediction = predict(work_of(items[0]), finding, warps, fp8, chip, clock)
            made.append(
                {
                    "op": name,
                    "times": len(items),
                    "tile": audit.describe(compilation)["tile"],
                    "programs": finding.programs,
                    "shared": finding.shared,
                    "stack": finding.stack,
                    **(asdict(finding.waits) if finding.waits is not None else {}),
                    **asdict(prediction),
                }
            )
        return made

    loaded = rows(chip.loaded)
    busy = sum(row["times"] * row["floor"] for row in loaded)
    if busy > sum(row["times"] * row["seconds"] for row in loaded) / 2:
        return loaded
    return rows(chip.boost)


def summary(rows: Iterable[Row], batch: int) -> dict[str, float]:
    rows = list(rows)
    seconds = sum(row["times"] * row["seconds"] for row in rows)
    floor = sum(row["times"] * row["floor"] for row in rows)
    return {"seconds": seconds, "floor": floor, "images_per_second": batch / seconds}


def kept(found: list[Row], name: str = "predicted") -> list[Any]:
    """The lines of a file of predictions: of each launch, no more than the report needs."""
    chips = {str(arch): asdict(CHIPS[arch]) for arch in {result["arch"] for result in found}}
    command = "python -P benchmarks/audit/predict.py --json FILE"
    lines: list[Any] = [results.facts(name, command, prediction=True, chips=chips)]
    fields = ("op", "times", "seconds", "floor", "bound", "tile", "shared", "stack",
              "before", "each", "after", "under_way")  # fmt: skip
    for result in found:
        job = {name: result[name] for name in ("model", "batch", "precision", "arch")}
        job["stage"] = "predicted"
        job["key"] = "{model}/b{batch}/{precision}/sm_{arch}".format(**job)
        total = {name: value for name, value in result.items() if name != "rows"}
        launches = [{k: row[k] for k in fields if k in row} for row in result["rows"]]
        lines.append([{**job, **row} for row in ({**total, "op": "forward"}, *launches)])
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(CHIPS))
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--precision", action="append", choices=list(audit.DTYPES))
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--unmeasured", action="store_true", help="a file of kernels that no GPU has measured yet"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    found = []
    print("PREDICTED from machine code, not measured")
    for arch in options.arch or [90]:
        chip = CHIPS[arch]
        print(f"\nsm_{arch}, as a {chip.name}: {chip.matrix / 1e12:.0f} TFLOP/s bf16, "
              f"{chip.copy / 1e12:.2f} TB/s ({chip.source})")  # fmt: skip
        for model in options.model or ["stellar-h16"]:
            for precision in options.precision or ["bf16", "fp8"]:
                if precision == "fp8" and arch < 89:
                    continue
                for batch in options.batch or [1, 64]:
                    rows = rows_of(MODELS[model], precision, batch, chip, arch, options.workers)
                    total = summary(rows, batch)
                    found.append(
                        {"arch": arch, "chip": chip.name, "model": model, "precision": precision,
                         "batch": batch, **total, "rows": rows}
                    )  # fmt: skip
                    _print(model, precision, batch, rows, total)
    if options.json:
        name = "predicted-unmeasured" if options.unmeasured else "predicted"
        options.json.write_bytes(results.lines_of(kept(found, name)))
    return 0


def _print(
    model: str, precision: str, batch: int, rows: list[Row], total: dict[str, float]
) -> None:
    print(
        f"\n{model} {precision}, batch {batch}: predicted {total['seconds'] * 1e3:.3f} ms, "
        f"{total['images_per_second']:.0f} images/s; floor {total['floor'] * 1e3:.3f} ms"
    )
    print(f"  {'op':14}{'times':>6}{'us':>9}{'floor':>9}{'of floor':>9}{'waves':>8}  bound")
    for row in rows:
        print(
            f"  {row['op']:14}{row['times']:>6}{row['seconds'] * 1e6:>9.1f}"
            f"{row['floor'] * 1e6:>9.1f}{row['floor'] / row['seconds']:>9.0%}{row['waves']:>8.2f}"
            f"  {row['bound']:13} {row['tile']}, {row['programs']}/SM"
        )


if __name__ == "__main__":
    sys.exit(main())
