"""`encode` end to end on the CPU: ours, plain PyTorch, and others' runtimes, in turns."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compare
import contest
import footprint
import harness
import numpy as np
import peers
import pytest
import torch

from stellar_fast.config import MODELS

MODEL = "stellar-b16"
OURS = "engine fp32"
# batch: (sets of inputs, rounds). The sets of a batch are 4.8 MB and more together, twice a core's
# L2 cache. A round at batch 32 takes half a minute on two cores; three give a median and a spread.
PLAN = {1: (8, 16), 8: (3, 5), 32: (2, 3)}
LATENCY_CALLS, LATENCY_SECONDS = 1000, 60
CHOICES = (
    "bf16 at batch 32 only on processors with bf16 matrix units: elsewhere it takes twice as long "
    "as fp32 in every implementation, which batches 1 and 8 show",
    "OpenVINO, ONNX Runtime and torch.compile are given the exact shape, which suits them best; "
    "prepare_seconds is what they take for it, with no cache of theirs but the file system's",
    f"latency: at most {LATENCY_CALLS} calls each and {LATENCY_SECONDS} s together, whichever is "
    "less; `calls` says how many",
)


@dataclass
class Record:
    """What the tests of this file measured, for one result file."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    footprint: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> peers.Subject:
    return peers.Subject(MODELS[MODEL], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def entrants(subject) -> dict[str, contest.Entrant]:
    """Those that take any batch, made once."""
    found = [subject.plain("fp32"), subject.plain("bf16"), subject.engine("fp32")]
    found += [subject.engine("bf16")]
    return {entrant.name: entrant for entrant in found}


@pytest.fixture(scope="module")
def record(request) -> Iterator[Record]:
    found, load, start = Record(), os.getloadavg(), time.perf_counter()
    yield found
    if not found.rows:
        return
    path = harness.write_result(
        "cpu",
        "encode",
        found.rows,
        processor=harness.processor(),
        baseline=contest.BASELINE,
        seconds=round(time.perf_counter() - start),
        load_average_before=load,
        plan={
            str(batch): {"sets": sets, "rounds": rounds} for batch, (sets, rounds) in PLAN.items()
        },
        choices=CHOICES,
        skipped=found.skipped,
        latency=found.latency,
        footprint=found.footprint,
    )
    lines, slower = compare.report(path)
    threads = torch.get_num_threads()
    harness.SUMMARY.append(
        f"\n{threads} threads, load average {load[0]:.2f} at the start -> {path.name}"
    )
    harness.SUMMARY.extend([*_table(found), *lines])
    if slower and request.config.getoption("--fail-slower"):
        pytest.fail("\n".join(lines))


def _table(found: Record) -> Iterator[str]:
    yield from contest.table(found.rows)
    for name, reason in found.skipped.items():
        yield f"  {name} skipped: {reason}"
    for row in found.latency:
        median, p99 = row["median"] * 1e3, row["p99"] * 1e3
        yield (
            f"  {row['name']}, batch 1: median {median:.1f} ms, 99th percentile {p99:.1f} ms over "
            f"{row['calls']} calls"
        )
    for row in found.footprint:
        yield (
            f"  {row['name']}: loads in {row['load_seconds']:.2f} s, peak {row['peak_mib']} MiB at "
            f"batch {row['batch']}"
        )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("batch", PLAN)
def test_encode(batch, benchmark, subject, entrants, record, tmp_path):
    """No figure outside its error budget; only a wrong engine fails, a wrong peer is refused."""
    sets, rounds = PLAN[batch]
    inputs = [contest.pictures(batch, 224, seed) for seed in range(sets)]
    units = harness.processor()["bf16_matrix_units"]
    precisions = ("fp32", "bf16") if batch < 32 or units else ("fp32",)
    task = contest.Task.of(
        MODEL,
        inputs,
        subject.eager("fp64"),
        {precision: subject.eager(precision) for precision in precisions},
    )
    always = [entrant for entrant in entrants.values() if entrant.precision in precisions]
    makers = {
        "torch.compile": lambda: peers.compiled(subject, inputs[0]),
        "ONNX Runtime fp32": lambda: peers.onnxruntime(subject, inputs[0], tmp_path),
        "transformers ViTModel": lambda: peers.transformers_vit(subject),
    }
    for precision in precisions:
        makers[f"OpenVINO {precision}"] = functools.partial(
            peers.openvino, subject, inputs[0], precision
        )
    others, absent = peers.present(makers)
    record.skipped.update(absent)

    match = contest.Contest(task, [*always, *others])
    if OURS in match.refused:  # the others are still worth their figures
        for _ in range(rounds):
            match.round()
    else:
        benchmark.pedantic(
            lambda: match.turn(OURS),
            setup=lambda: match.round(without=OURS),
            rounds=rounds,
            iterations=1,
        )
    rows = match.rows()
    benchmark.extra_info["rows"] = rows
    record.rows.extend(rows)
    wrong = {name: why for name, why in match.refused.items() if name.startswith(contest.OURS)}
    assert not wrong


@pytest.mark.timeout(300)
def test_latency_of_one_image(entrants, record):
    """Median and 99th percentile of single calls, engine and plain PyTorch in turns."""
    inputs = [contest.pictures(1, 224, seed) for seed in range(PLAN[1][0])]
    names = [OURS, contest.BASELINE]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for call in range(LATENCY_CALLS + 2):
        if call > 30 and time.perf_counter() - start > LATENCY_SECONDS:
            break
        for name in names:
            before = time.perf_counter()
            entrants[name].encode(inputs[call % len(inputs)])
            seconds[name].append(time.perf_counter() - before)
    for name in names:
        calls = seconds[name][2:]  # the first two warm up
        median, p99 = np.percentile(calls, [50, 99]).tolist()
        record.latency.append({"name": name, "median": median, "p99": p99, "calls": len(calls)})


@pytest.mark.timeout(300)
def test_footprint(record, tmp_path: Path):
    """Load time from a file, and peak memory at batch 8, each in a process of its own."""
    record.footprint.extend(footprint.measure_all(MODELS[MODEL], tmp_path, 8))
