"""Tuning: which tiles are fastest on a GPU, as the launch table that the kernels read.

    python -P benchmarks/gpu/run.py --stages environment tune  times them on the GPU at hand
    python -P benchmarks/gpu/tune.py RESULT                    writes kernels/tuned/sm_XX.json
    python -P benchmarks/gpu/tune.py --dry-run [--arch 90]     candidates, with PREDICTED times

Candidates are the tiles of the heuristics' family that the static audit accepts: all add a row up
alike, so no result depends on the batch. One replaces the heuristics' choice only where its upper
quartile is below the lower quartile of theirs, and never where its result is outside the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
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
from harness.workloads import DTYPES, Case, arguments, cases, op_of
from peers.ops import Race

from stellar_fast import kernels
from stellar_fast.config import MODELS
from stellar_fast.kernels import gpus, launch, tables
from stellar_fast.kernels.attention import attention_tile
from stellar_fast.kernels.linear import linear_tile
from stellar_fast.kernels.tables import AttentionTile, Table, Tile

OPS = ("qkv", "proj", "fc1", "fc2", "attention")
POINTS = [(m, b) for b in (64, 1, 8, 256) for m in ("stellar-h16", "stellar-l16", "stellar-b16")]
POINTS += [(model, 64) for model in ("stellar-b8", "stellar-b24")]  # their own lengths
SECONDS, LEAST = 0.5, 10  # of timing a case, and rounds
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
        return Table(attention={Shape.of(case): tile})
    return Table(linear={Shape.of(case): ((1, tile),)})


def heuristic(gpu: gpus.Gpu, case: Case) -> Tile | AttentionTile:
    """What is launched without a table."""
    dtype, first, second = Shape.of(case)
    kind = next(key for key, name in launch.NAMES.items() if name == dtype)
    with launch.tuned_by(tables.EMPTY):
        if case.name == "attention":
            return attention_tile(gpu, kind, first, second, gpu.descriptors)
        return linear_tile(gpu, kind, case.rows, first, second)


def candidates(gpu: gpus.Gpu, case: Case) -> list[Tile | AttentionTile]:
    """Tiles to try beside the heuristics' own; the audit judges them."""
    own = heuristic(gpu, case)
    if isinstance(own, AttentionTile):
        held = ([True] if gpu.descriptors else []) + [False]
        found: list[Tile | AttentionTile] = [
            AttentionTile(rows, keys, warps, stages, resident)
            for resident in held
            for rows, warps in ((64, 4), (128, 8), (128, 4))
            for keys in (32, 64, 128)
            for stages in ((1, 2) if resident else (2, 3))
        ]
    else:
        depths = (own.block_k,) if own.promote else (own.block_k, own.block_k // 2)
        found = [
            replace(
                own, block_n=width, block_k=depth, num_stages=stages, slices=min(2, width // 64)
            )
            for width in (256, 128, 64)
            for depth in depths
            for stages in ((2, 3, 4) if depth == own.block_k else (4, 6))
        ]
        assert all(tile.family == own.family for tile in found if isinstance(tile, Tile))
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


def measure(
    case: Case, gpu: gpus.Gpu, audits: Mapping[Any, Future[Finding]], device: torch.device
) -> Row:
    """The row of a case: every legal candidate's time in turn with the heuristics' tile."""
    tried: dict[str, dict[str, Any]] = {}
    entrants: list[tuple[str, Callable[..., Any]]] = []
    inputs = arguments(case, device, 0)
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
        if not pending:  # the first row starts them all: the cores compile while the GPU works
            for item in chosen[chosen.index(case) :]:
                pending[item.key] = compiling(item, gpu)
        return measure(case, gpu, pending[case.key], torch.device("cuda"))

    def rows_of(case: Case) -> list[Row]:
        return [row(case)]

    for case in chosen:
        yield case.key, partial(rows_of, case), 60.0


def winner(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the tile that a row speaks for."""
    timed = [item for item in row["tiles"] if "median" in item]
    best = min(timed, key=lambda item: item["median"], default=None)
    if best is None or best["high"] >= row["low"]:
        return row[OURS]
    return best["tile"]


def table_of(facts: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """The launch table that rows of the stage "tune" speak for, as JSON has it.

    Between two numbers of rows that were measured, the nearer one's tile is taken, by ratio.

    Raises:
        ValueError: there are none with figures, or they are of several GPUs.
    """
    rows = [row for row in rows if "tiles" in row and "median" in row]
    archs = {row["arch"] for row in rows}
    if len(archs) != 1:
        raise ValueError(f"rows of the stage 'tune' are of {sorted(archs) or 'no GPU'}")
    attention: list[Any] = []
    by_shape: dict[Any, Any] = {}
    for row in rows:
        if row["op"] == "attention":
            found = by_shape.setdefault(("attention", *row["shape"]), {})
        else:
            found = by_shape.setdefault(("linear", *row["shape"]), {})
        found[row["rows"]] = row
    linear = []
    for (kind, dtype, first, second), found in by_shape.items():
        if kind == "attention":
            best = _one_for_all(list(found.values()))
            if best is not None:
                shape = {"dtype": dtype, "length": first, "head_dim": second}
                attention.append({**shape, **best})
            continue
        if all(winner(row) == row[OURS] for row in found.values()):
            continue
        tiles: list[dict[str, Any]] = []
        before = None
        for count in sorted(found):
            start = 1 if before is None else math.ceil(math.sqrt(before * count))
            before, tile = count, winner(found[count])
            if not tiles or tile != {k: v for k, v in tiles[-1].items() if k != "rows"}:
                tiles.append({"rows": start, **tile})
        linear.append({"dtype": dtype, "columns": first, "depth": second, "tiles": tiles})
    origin = {name: facts[name] for name in tables.ORIGIN}
    content = {"arch": archs.pop(), **origin, "linear": linear, "attention": attention}
    tables.parsed(content, content["arch"])
    return content


def _one_for_all(rows: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The tile that is best over all batches, which attention's choice cannot tell apart.

    By the geometric mean of its times over the heuristics'; None unless it wins at one batch by
    more than the spread and loses at none.
    """
    times: dict[str, list[tuple[float, bool, bool]]] = {}
    fields = {}
    for row in rows:
        for item in row["tiles"]:
            if "median" in item:
                name = json.dumps(item["tile"], sort_keys=True)
                fields[name] = item["tile"]
                wins, loses = item["high"] < row["low"], item["low"] > row["high"]
                ratio = math.log(item["median"] / row["median"])
                times.setdefault(name, []).append((ratio, wins, loses))
    good = {
        name: sum(ratio for ratio, _, _ in found)
        for name, found in times.items()
        if len(found) == len(rows)
        and any(wins for _, wins, _ in found)
        and not any(loses for _, _, loses in found)
    }
    return fields[min(good, key=lambda name: good[name])] if good else None


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
    parser.add_argument("result", type=Path, nargs="?", help="a result file of gpu/run.py")
    parser.add_argument("--out", type=Path, help="the table; by default where kernels read it")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(gpus.GPUS))
    options = parser.parse_args(arguments)
    if options.dry_run:
        _dry_run(options.arch)
        return 0
    if options.result is None:
        parser.error("give a result file of gpu/run.py, or --dry-run")
    try:
        result = read(options.result)
        content = table_of(result.facts, result.rows("tune"))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.result}: {error}")
    out = options.out or ROOT / "kernels" / "tuned" / f"sm_{content['arch']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(content['linear'])} products and {len(content['attention'])} attentions -> {out}")
    print(f"before it is committed: python -P benchmarks/audit/run.py --arch {content['arch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
