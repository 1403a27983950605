"""Extraction keeps the engine busy: what stands before and behind it takes none of its time."""

import time

import pytest
from engines import small_engine
from extracting import Wrapped, touch

from stellar_fast.extract import Pipeline, Summary, identify, plan, prepare

BATCH, SECONDS, BATCHES = 32, 0.08, 60


def pipeline_of(tmp_path, engine, **arguments):
    """A pipeline that reads and writes nothing, and the images of its one partition."""
    touch(tmp_path, *(f"{number:04}.jpg" for number in range(BATCH * BATCHES)))
    dummies = {"dummy_reader": True, "dummy_writer": True}
    job = plan(tmp_path, "nowhere", batch_size=BATCH, **dummies | arguments)
    made = prepare(job, identify(engine), BATCH)
    return job, made


def device_like(engine):
    """An engine that needs none of the CPU while it works, as on a GPU, and its busy seconds."""
    features, busy = {}, []

    def encode(images, **arguments):
        if len(images) not in features:
            features[len(images)] = engine.encode(images, **arguments)
        start = time.perf_counter()
        time.sleep(SECONDS if len(images) else 0)
        busy.append(time.perf_counter() - start)
        return features[len(images)]

    return Wrapped(engine, encode), busy


def test_the_engine_is_never_idle_when_decoding_is_fast_enough(tmp_path):
    """At least 95 % of its own rate, from the second batch on: processes start before the first."""
    engine, busy = device_like(small_engine())
    job, made = pipeline_of(tmp_path, engine)
    times = []
    report = lambda *counts: times.append(time.perf_counter())  # noqa: E731
    with Pipeline(
        None, made, engine, job.options, items=lambda part: list(job.items), report=report
    ) as pipeline:
        (manifest,) = pipeline.run([0])
    assert manifest["rows"] == BATCH * BATCHES
    assert len(times) == BATCHES
    assert sum(busy[-(BATCHES - 1) :]) >= 0.95 * (times[-1] - times[0])


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({"encode": 10, "wait": 0.5, "decode": 30}, "encode"),
        ({"encode": 5, "wait": 5, "decode": 20, "read": 3}, "decode"),
        ({"encode": 5, "wait": 5, "decode": 3, "read": 20}, "read"),
        ({"encode": 5, "blocked": 5, "wait": 0.1, "write": 9}, "write"),
    ],
)
def test_the_stage_that_limits_is_told(seconds, limit):
    summary = Summary()
    summary.add(seconds)
    assert summary.limit == limit


def test_a_slow_writer_is_what_limits(tmp_path, monkeypatch):
    from stellar_fast.extract.partition import Unwritten

    monkeypatch.setattr(Unwritten, "append", lambda *arguments: time.sleep(2 * SECONDS))
    engine, _ = device_like(small_engine())
    job, made = pipeline_of(tmp_path, engine)
    with Pipeline(
        None, made, engine, job.options, items=lambda part: list(job.items)[: 20 * BATCH]
    ) as pipeline:
        list(pipeline.run([0]))
        summary = Summary()
        summary.add(pipeline.timer.take())
    assert summary.limit == "write"
