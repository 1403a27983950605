"""`encode` end to end on the CPU: ours, plain PyTorch, and others' runtimes, in turns."""

from __future__ import annotations

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
# batch: (sets of inputs, rounds). The sets of a batch are 9.6 MB and more together, several times a
# core's L2 cache. A round at batch 32 takes half a minute on two cores.
PLAN = {1: (16, 16), 8: (5, 5), 32: (2, 3)}
POOL = 40  # images that the sets are cut from
LATENCY_CALLS, LATENCY_SECONDS = 1000, 30
LOAD = os.getloadavg()  # before any process of ours
CHOICES = (
    "every implementation in a process of its own, called in turns, in another order each round",
    "bf16 at batch 32 only on processors with bf16 matrix units: elsewhere it is slower "
    "than fp32 in every implementation, which batches 1 and 8 show",
    "OpenVINO, ONNX Runtime and torch.compile are given the exact shape, which suits them best; "
    "prepare_seconds is from weights in memory, or drawn, to the first result of that shape, with "
    "no compilation cached",
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
def pool(tmp_path_factory) -> contest.Pool:
    subject = peers.Subject(MODELS[MODEL], tmp_path_factory.mktemp("model"))
    plain = {precision: subject.eager(precision) for precision in ("fp32", "bf16")}
    return contest.Pool(MODEL, contest.pictures(POOL, 224, 0), subject.eager("fp64"), plain)


@pytest.fixture(scope="module")
def remotes(tmp_path_factory) -> Iterator[dict[str, peers.Remote]]:
    folder, threads = tmp_path_factory.mktemp("remotes"), torch.get_num_threads()
    found = {
        name: peers.Remote(name, MODELS[MODEL], folder / str(index), threads)
        for index, name in enumerate(peers.IMPLEMENTATIONS)
    }
    yield found
    for remote in found.values():
        remote.close()


@pytest.fixture(scope="module")
def record(request) -> Iterator[Record]:
    found, start = Record(), time.perf_counter()
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
        load_average_before=LOAD,
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
        f"\n{threads} threads, load average {LOAD[0]:.2f} at the start -> {path.name}"
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
def test_encode(batch, benchmark, pool, remotes, record):
    """No figure outside its error budget; only a wrong engine fails, a wrong peer is refused."""
    sets, rounds = PLAN[batch]
    units = harness.processor()["bf16_matrix_units"]
    entrants = []
    for name, remote in remotes.items():
        if name in record.skipped or (batch == 32 and remote.precision == "bf16" and not units):
            continue
        try:
            remote.prepare(pool.images[:batch])
        except peers.Absent as reason:
            record.skipped[name] = str(reason)
        else:
            entrants.append(remote)

    match = contest.Contest(pool, entrants, batch, sets, rounds)
    benchmark.pedantic(
        match.next,
        setup=lambda: match.until(OURS),
        teardown=match.done,
        rounds=rounds,
        iterations=1,
    )
    match.finish()
    rows = match.rows()
    benchmark.extra_info["rows"] = rows
    record.rows.extend(rows)
    wrong = {name: why for name, why in match.refused.items() if name.startswith(contest.OURS)}
    assert not wrong


@pytest.mark.timeout(300)
def test_latency_of_one_image(pool, remotes, record):
    """Median and 99th percentile of single calls, engine and plain PyTorch in turns."""
    names = [OURS, contest.BASELINE]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        remotes[name].prepare(pool.images[:1])
    start = time.perf_counter()
    for call in range(LATENCY_CALLS):
        if call > 30 and time.perf_counter() - start > LATENCY_SECONDS:
            break
        for name in names:
            remotes[name].load(pool.images[call % POOL, None])
            seconds[name].append(remotes[name].run())
    for name in names:
        median, p99 = np.percentile(seconds[name], [50, 99]).tolist()
        calls = len(seconds[name])
        record.latency.append({"name": name, "median": median, "p99": p99, "calls": calls})


@pytest.mark.timeout(300)
def test_footprint(record, tmp_path: Path):
    """Load time from a file, and peak memory at batch 8, each in a process of its own."""
    record.footprint.extend(footprint.measure_all(MODELS[MODEL], tmp_path, 8))
