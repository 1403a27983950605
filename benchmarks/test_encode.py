"""`encode` end to end on the CPU: ours, plain PyTorch, and others' runtimes, in turns.

On a GPU it is measured by `benchmarks/gpu/run.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.budgets import Pool
from harness.results import is_ours
from harness.timing import Timing, in_turns, turns_of
from peers import contest, footprint, models

import stellar_fast
from stellar_fast.config import MODELS
from stellar_fast.module import FEATURES

MODEL = "stellar-b16"
OURS = "engine bf16"
# batch: (sets of inputs, rounds). The sets of a batch are 9.6 MB and more together, several times a
# core's L2 cache. A round at batch 32 takes half a minute on two cores.
PLAN = {1: (16, 10), 8: (2, 4), 32: (1, 3)}
POOL = 16  # images that the sets are cut from, at batch 32 each of them twice
MODULE_BATCHES, MODULE_SECONDS = (1, 8), 20
LATENCY_CALLS, LATENCY_SECONDS = 1000, 30
BEYOND_ONE = ("engine", "OpenVINO", models.BASELINE)
LOAD = os.getloadavg()  # before any process of ours
CHOICES = (
    "every implementation in a process of its own, called in turns, in another order each round",
    "beyond batch 1 the engine, OpenVINO and plain PyTorch in fp32: rounds of all take minutes",
    "scales of int8, ours and NNCF's, from the same 32 images, on which nobody is timed or judged; "
    "int8 has no error budget, and the engine's errors may not exceed NNCF's",
    "OpenVINO, ONNX Runtime and torch.compile are given the exact shape, which suits them best; "
    "prepare_seconds is from weights in memory, or drawn, to the first result of that shape, with "
    "no compilation cached",
    f"latency: at most {LATENCY_CALLS} calls each and {LATENCY_SECONDS} s together, whichever is "
    "less; `calls` says how many",
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    subject = models.Subject(MODELS[MODEL], tmp_path_factory.mktemp("model"))
    return contest.pool_of(subject, POOL)


@pytest.fixture(scope="module")
def remotes(tmp_path_factory) -> Iterator[dict[str, models.Remote]]:
    folder, threads = tmp_path_factory.mktemp("remotes"), torch.get_num_threads()
    found = {
        name: models.Remote(name, MODELS[MODEL], folder / str(index), threads)
        for index, name in enumerate(models.IMPLEMENTATIONS)
    }
    yield found
    for remote in found.values():
        remote.close()


@pytest.fixture(scope="module")
def record(record_of):
    planned = {("encode", f"{MODEL}/b{batch}") for batch in PLAN}
    planned |= {("latency", f"{MODEL}/b1"), ("footprint", f"{MODEL}/b8")}
    planned |= {("module", f"{MODEL}/b{batch}") for batch in MODULE_BATCHES}
    plan = {str(batch): {"sets": sets, "rounds": rounds} for batch, (sets, rounds) in PLAN.items()}
    return record_of("encode", planned, load_average_before=LOAD, plan=plan, choices=CHOICES)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("batch", PLAN)
def test_encode(batch, benchmark, pool, remotes, record, say):
    """No figure outside its error budget; only a wrong engine fails, a wrong peer is refused."""
    sets, rounds = PLAN[batch]
    entrants, absent = [], []
    base = {"stage": "encode", "key": f"{MODEL}/b{batch}", "model": MODEL, "batch": batch}
    for name, remote in remotes.items():
        if batch > 1 and not name.startswith(BEYOND_ONE):
            remote.close()  # and its memory goes to the others
            continue
        try:
            remote.prepare(pool.images[pool.rows(batch, 0)])
        except models.Absent as reason:
            precision = remote.precision
            absent.append({**base, "name": name, "precision": precision, "not_run": str(reason)})
        else:
            entrants.append(remote)
            say(f"  {name} is ready at batch {batch}: {remote.facts['prepare_seconds']:.1f} s")

    rows = contest.race(pool, entrants, batch, sets, rounds) + absent
    record.rows += rows
    for line in contest.report(rows):
        say(line)
    assert not [row for row in rows if is_ours(row) and "refused" in row]
    errors = {row["name"]: row.get("error") for row in rows}
    for output, error in (errors.get(models.NNCF) or {}).items():
        assert errors[models.INT8][output] <= error, f"int8 {output}: NNCF's error is smaller"
    benchmark.pedantic(remotes[OURS].run, rounds=3, iterations=1)
    benchmark.extra_info["rows"] = rows


@pytest.mark.timeout(300)
def test_latency_of_one_image(pool, remotes, record, say):
    """Median and 99th percentile of single calls, engine and plain PyTorch in turns."""

    def turn(remote: models.Remote, call: int) -> float:
        remote.load(pool.images[call % POOL, None])
        return remote.run()

    names = [OURS, models.BASELINE]
    for name in names:
        remotes[name].prepare(pool.images[:1])
    turns = {name: lambda call, name=name: turn(remotes[name], call) for name in names}
    found, _ = in_turns(turns, least=30, seconds=LATENCY_SECONDS, most=LATENCY_CALLS)
    for name, seconds in found.items():
        row = {"stage": "latency", "key": f"{MODEL}/b1", "name": name, "model": MODEL, "batch": 1}
        tail = float(np.percentile(seconds, 99))
        record.rows.append({**row, **vars(Timing.of(seconds)), "p99": tail, "calls": len(seconds)})
        median = float(np.median(seconds))
        say(f"  {name}, batch 1: median {median * 1e3:.1f} ms, 99th percentile {tail * 1e3:.1f} ms")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("batch", MODULE_BATCHES)
def test_the_module_beside_an_engine(batch, record, say):
    """What `load_stellar` gives against `load`, with the same weights and outputs, in turns.

    The goal is 3 %. A figure and no test: other work on the machine may cost either more.
    """
    found = {"device": "cpu", "weights": "synthetic"}
    engine = stellar_fast.load(MODEL, precision="fp32", **found)
    module = stellar_fast.load_stellar(MODEL, **found).requires_grad_(False)
    sets = list(torch.rand(8, batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    calls = {
        "engine fp32": [lambda x=x: engine.encode(x, outputs=FEATURES) for x in sets],
        "module fp32": [lambda x=x: module.encode(x) for x in sets],
    }
    turns = turns_of(calls, torch.device("cpu"))
    seconds, _ = in_turns(turns, least=10, seconds=MODULE_SECONDS, most=LATENCY_CALLS)
    for name, taken in seconds.items():
        row = {"stage": "module", "key": f"{MODEL}/b{batch}", "name": name, "model": MODEL}
        record.rows.append({**row, "batch": batch, **vars(Timing.of(taken))})
    pairs = [b / a for a, b in zip(seconds["engine fp32"], seconds["module fp32"], strict=True)]
    ratio = Timing.of(pairs)
    say(
        f"  the module takes {ratio.median:.3f} of its engine's time at batch {batch}, quartiles "
        f"{ratio.low:.3f} to {ratio.high:.3f} of {ratio.rounds} rounds"
    )


@pytest.mark.timeout(300)
def test_footprint(record, say, tmp_path: Path):
    """Load time from a file, and peak memory at batch 8, each in a process of its own."""
    rows = footprint.measure_all(MODELS[MODEL], tmp_path, 8)
    record.rows += rows
    for row in rows:
        say(
            f"  {row['name']}: loads in {row['load_seconds']:.2f} s, first result after "
            f"{row['first_result_seconds']:.2f} s, peak {row['peak_mib']} MiB"
        )
