"""Tuning: which tiles are fastest on a GPU, as the launch table that the kernels read.

    python -P benchmarks/gpu/run.py --stages environment tune  times them on the GPU at hand
    python -P benchmarks/gpu/tune.py RESULT...                 writes kernels/tuned/sm_XX.json
    python -P benchmarks/gpu/tune.py --dry-run [--arch 90]     candidates, with PREDICTED times

Candidates are tiles that the static audit accepts. Of a product only those count that gave bit for
bit what the heuristics' tile gives, so that no result depends on the batch. One replaces the
heuristics' choice only where its upper quartile is below the lower quartile of theirs, and never
where its result is outside the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before Triton is imported; workers inherit it
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

import torch
from audit import run as audit
from audit.compilation import Compilation, Finding, compile_one
from harness.budgets import refusal_of_op
from harness.results import ROOT, Row, read
from harness.workloads import BYTES, DTYPES, Case, arguments, cases, op_of
from peers.ops import Race

from stellar_fast import kernels
from stellar_fast.config import MODELS
from stellar_fast.kernels import gpus, launch, tables
from stellar_fast.kernels.attention import attention_tile
from stellar_fast.kernels.linear import linear_tile
from stellar_fast.kernels.tables import AttentionTile, Table, Tile

OPS = ("qkv", "proj", "fc1", "fc2", "attention")
POINTS = [(m, b) for b in (64, 1, 8, 256) for m in ("stellar-h16", "stellar-b16", "stellar-l16")]
POINTS += [(m, b) for b in (64, 1) for m in ("stellar-b8", "stellar-b24")]  # their own lengths
SECONDS, LEAST = 0.5, 10  # of timing a case, and rounds
AHEAD = 5  # cases whose candidates are compiled at a time
OURS = "heuristics"
META = torch.device("meta")


class Shape(NamedTuple):
    """What a table's entry is found by, and the dtype of the operands."""

    dtype: str
    first: int  # columns of a product, or length of a sequence
    second: int  # depth of a product, or head_dim

    @classmethod
    def of(cls, case: Case) -> Shape:
        config = MODELS[case.model]
        if case.name == "attention":
            dtype = launch.NAMES[DTYPES[case.precision]]
            return cls(dtype, config.sequence_length, config.backbone.head_dim)
        return cls(case.precision, case.columns, case.depth)


def forced(case: Case, tile: Tile | AttentionTile) -> Table:
    """A table that has this tile for this case and nothing else."""
    if isinstance(tile, AttentionTile):
        return Table(attention={Shape.of(case): ((1, tile),)})
    return Table(linear={Shape.of(case): ((1, tile),)})


def heuristic(gpu: gpus.Gpu, case: Case) -> Tile | AttentionTile:
    """What is launched without a table."""
    dtype, first, second = Shape.of(case)
    kind = next(key for key, name in launch.NAMES.items() if name == dtype)
    with launch.tuned_by(tables.EMPTY):
        if case.name == "attention":
            heads = MODELS[case.model].backbone.num_attention_heads
            return attention_tile(gpu, kind, case.batch, heads, first, second)
        return linear_tile(gpu, kind, case.rows, first, second)


# What is tried on matrix units that four warps share: rows, columns, how many times the heuristics'
# depth, warps, stages, programs side by side. Two of those overlap the one's finishing with the
# other's products; twice the depth halves the waits of a small batch.
HOPPER = (
    (128, 256, 1, 8, (3, 4), 1),
    (128, 128, 1, 8, (3, 4, 6), 1),
    (128, 128, 2, 8, (3,), 1),
    (128, 128, 1, 4, (2, 3), 2),
    (128, 64, 1, 4, (3, 4), 2),
    (128, 64, 2, 4, (2,), 2),
    (128, 64, 2, 8, (3, 4), 1),
    (64, 128, 1, 4, (3, 4), 2),
    (64, 128, 2, 4, (2,), 2),
    (64, 128, 1, 4, (6, 8), 1),
    (64, 128, 2, 4, (3, 4), 1),
    (64, 64, 1, 4, (4, 6), 2),
    (64, 64, 2, 4, (2, 3), 2),
    (64, 64, 2, 4, (4, 6), 1),
)

# The same on parts with less shared memory, whose tiles all have the heuristics' rows and warps:
# columns, halves that twice the heuristics' depth is cut into, stages, programs side by side.
SMALLER = (
    (256, 2, (2, 3, 4), 1),
    (256, 4, (4, 6), 1),
    (128, 1, (2,), 1),
    (128, 2, (2, 3, 4), 1),
    (128, 4, (4, 6), 1),
    (128, 4, (2, 3), 2),
    (64, 1, (2, 3), 1),
    (64, 2, (2, 3, 4), 1),
    (64, 4, (4, 6), 1),
    (64, 4, (3, 4), 2),
)


def candidates(gpu: gpus.Gpu, case: Case) -> list[Tile | AttentionTile]:
    """Tiles to try beside the heuristics' own; the audit judges them."""
    own = heuristic(gpu, case)
    if isinstance(own, AttentionTile):
        found: list[Tile | AttentionTile] = [
            AttentionTile(rows, keys, warps, stages)
            for rows, warps in ((64, 4), (128, 8), (128, 4))
            for keys in (32, 64, 128)
            for stages in (2, 3, 4)
        ]
    elif gpu.shared > 200_000:
        deep = 128 // BYTES[case.precision]
        found = [
            Tile(rows, width, deep * depth, warps, stages, min(2, width // 64), residents)
            for rows, width, depth, warps, depths, residents in HOPPER
            for stages in depths
        ]
    else:
        found = [
            replace(
                own,
                block_n=width,
                block_k=own.block_k * 2 // halves,
                num_stages=stages,
                slices=min(2, width // 64),
                residents=residents,
            )
            for width, halves, depths, residents in SMALLER
            for stages in depths
        ]
    return [tile for tile in found if tile != own]


def launched(case: Case, gpu: gpus.Gpu, tile: Tile | AttentionTile) -> launch.Launch:
    """The launch of a case with a tile, seen on tensors without data."""
    seen: list[launch.Launch] = []
    with launch.on_gpu(gpu.arch, seen.append), launch.tuned_by(forced(case, tile)):
        values, keywords = arguments(case, META, 0)
        getattr(kernels, op_of(case))(*values, **keywords)
    (found,) = seen
    return found


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))


@cache
def _audited(item: Compilation, limit: int) -> Future[Finding]:
    return _pool().submit(compile_one, item, limit)


def compiling(case: Case, gpu: gpus.Gpu) -> dict[Tile | AttentionTile, Future[Finding]]:
    """The audit of every candidate, under way on the machine's cores, once for all batches.

    What it compiles lies in Triton's cache when the candidate is launched.
    """
    return {
        tile: _audited(audit.compilation(launched(case, gpu, tile), gpu.arch), gpu.shared)
        for tile in candidates(gpu, case)
    }


def _with(case: Case, tile: Tile | AttentionTile) -> Callable[..., Any]:
    kernel, table = getattr(kernels, op_of(case)), forced(case, tile)

    def call(*values: Any, **keywords: Any) -> Any:
        with launch.tuned_by(table):
            return kernel(*values, **keywords)

    return call


def _results(function: Callable[..., Any], inputs: tuple[list, dict]) -> list[torch.Tensor]:
    with torch.no_grad():
        found = function(*inputs[0], **inputs[1])
    found = [found] if isinstance(found, torch.Tensor) else found
    return [tensor.view(torch.uint8) for tensor in found]


def measure(
    case: Case, gpu: gpus.Gpu, audits: Mapping[Any, Future[Finding]], device: torch.device
) -> Row:
    """The row of a case: every legal candidate's time in turn with the heuristics' tile."""
    tried: dict[str, dict[str, Any]] = {}
    entrants: list[tuple[str, Callable[..., Any]]] = []
    inputs = arguments(case, device, 0)
    expected = _results(_with(case, heuristic(gpu, case)), inputs)
    for tile, audited in audits.items():
        name = repr(tile)
        tried[name] = {"tile": asdict(tile)}
        function = _with(case, tile)
        faults = audited.result().faults
        reason = "; ".join(faults) or refusal_of_op(case, function, inputs)
        if reason:
            tried[name]["refused"] = reason
        else:
            entrants.append((name, function))
            alike = zip(expected, _results(function, inputs), strict=True)
            tried[name]["alike"] = all(torch.equal(a, b) for a, b in alike)
    with launch.tuned_by(tables.EMPTY):
        race = Race(case, device, compiles=False, others=entrants).run(SECONDS, least=LEAST)
    own, *others = race.rows("tune")
    for row in others:
        tried[row["name"]] |= {"refused": row["not_run"]} if "not_run" in row else timing(row)
    facts = {"shape": list(Shape.of(case)), "rows": case.rows, "arch": gpu.arch}
    return own | facts | {OURS: asdict(heuristic(gpu, case)), "tiles": list(tried.values())}


def timing(row: Row) -> Row:
    return {name: row[name] for name in ("median", "low", "high", "rounds")}


def jobs(precisions: Iterable[str]) -> Iterator[tuple[str, Callable[[], list[Row]], float]]:
    """Keys, functions and bounds in seconds of the the stage "tune" of `gpu/run.py`."""
    known: set[tuple] = set()
    pending: dict[str, dict] = {}
    chosen = []
    for model, batch in POINTS:
        for precision in precisions:
            for case in cases(MODELS[model], batch, precision):
                point = (Shape.of(case), case.rows)
                if case.name in OPS and point not in known:
                    known.add(point)
                    chosen.append(case)

    def row(case: Case) -> dict[str, Any]:
        gpu = gpus.gpu_of_capability(*torch.cuda.get_device_capability())
        # The cores compile the next ones while the GPU works; no more, since not all may be asked.
        place = chosen.index(case)
        for item in chosen[place : place + AHEAD]:
            if item.key not in pending:
                pending[item.key] = compiling(item, gpu)
        return measure(case, gpu, pending[case.key], torch.device("cuda"))

    def rows_of(case: Case) -> list[Row]:
        return [row(case)]

    for case in chosen:
        yield case.key, partial(rows_of, case), 60.0


def winner(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the tile that a row speaks for: the fastest that gives the same bits."""
    timed = [item for item in row["tiles"] if "median" in item and item["alike"]]
    best = min(timed, key=lambda item: item["median"], default=None)
    if best is None or best["high"] >= row["low"]:
        return row[OURS]
    return best["tile"]


def _is_current(row: Row) -> bool:
    """Whether kernels still have tiles like those that were measured."""
    kind = AttentionTile if row["op"] == "attention" else Tile
    return set(row[OURS]) == {item.name for item in fields(kind)}


def table_of(facts: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """The launch table that rows of the stage "tune" speak for, as JSON has it.

    Between two numbers of rows that were measured, the nearer one's tile is taken, by ratio.

    Raises:
        ValueError: there are none with figures, or they are of several GPUs.
    """
    rows = [row for row in rows if "tiles" in row and "median" in row and _is_current(row)]
    archs = {row["arch"] for row in rows}
    if len(archs) != 1:
        raise ValueError(f"rows of the stage 'tune' are of {sorted(archs) or 'no GPU'}")
    names = {"linear": ("columns", "depth"), "attention": ("length", "head_dim")}
    found: dict[str, list] = {kind: [] for kind in names}
    by_shape: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        kind = "attention" if row["op"] == "attention" else "linear"
        by_shape.setdefault((kind, *row["shape"]), {})[row["rows"]] = row
    for (kind, dtype, *sizes), of_rows in by_shape.items():
        if all(winner(row) == row[OURS] for row in of_rows.values()):
            continue
        tiles: list[dict[str, Any]] = []
        before = None
        for count in sorted(of_rows):
            start = 1 if before is None else math.ceil(math.sqrt(before * count))
            before, tile = count, winner(of_rows[count])
            if not tiles or tile != {k: v for k, v in tiles[-1].items() if k != "rows"}:
                tiles.append({"rows": start, **tile})
        shape = dict(zip(names[kind], sizes, strict=True))
        found[kind].append({"dtype": dtype, **shape, "tiles": tiles})
    origin = {name: facts[name] for name in tables.ORIGIN}
    content = {"arch": archs.pop(), **origin, **found}
    tables.parsed(content, content["arch"])
    return content


def _dry_run(arch: int) -> None:
    from audit import predict

    gpu, chip = gpus.GPUS[arch], predict.CHIPS[arch]
    print(f"PREDICTED for a {chip.name} from machine code, not measured")
    for batch in (64, 1):
        for case in cases(MODELS["stellar-h16"], batch, "bf16"):
            if case.name not in OPS:
                continue
            own = heuristic(gpu, case)
            tiles = [own, *candidates(gpu, case)]
            items = [launched(case, gpu, tile) for tile in tiles]
            found = audit.audit(
                [audit.compilation(item, arch) for item in items], os.cpu_count() or 1
            )
            print(f"\n{case.key}: {len(tiles)} tiles")
            clock = chip.loaded if batch > 1 else chip.boost
            lines = []
            for tile, item, finding in zip(tiles, items, found, strict=True):
                mark = "  (the heuristics' own)" if tile == own else ""
                if finding.faults:
                    lines.append((math.inf, f"  {tile}: {'; '.join(finding.faults)}{mark}"))
                    continue
                work = predict.work_of(item)
                guess = predict.predict(work, finding, tile.num_warps, False, chip, clock)
                text = f"  {guess.seconds * 1e6:8.1f} us by {guess.bound}: {tile}{mark}"
                lines.append((guess.seconds, text))
            print("\n".join(text for _, text in sorted(lines)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="*", help="result files of gpu/run.py, the newest last"
    )
    parser.add_argument("--out", type=Path, help="the table; by default where kernels read it")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(gpus.GPUS))
    options = parser.parse_args(arguments)
    if options.dry_run:
        _dry_run(options.arch)
        return 0
    if not options.results:
        parser.error("give a result file of gpu/run.py, or --dry-run")
    rows: dict[str, Row] = {}
    for path in options.results:
        try:
            result = read(path)
            rows |= {row["key"]: row for row in result.rows("tune")}
            content = table_of(result.facts, rows.values())
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{path}: {error}")
    out = options.out or ROOT / "kernels" / "tuned" / f"sm_{content['arch']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(content['linear'])} products and {len(content['attention'])} attentions -> {out}")
    print(f"before it is committed: python -P benchmarks/audit/run.py --arch {content['arch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
