"""Extraction keeps the engine busy: what stands before and behind it takes none of its time."""

import threading
import time
from dataclasses import replace

import pytest
from engines import small_engine
from extracting import Wrapped, touch

from stellar_fast.extract import Summary, make_job
from stellar_fast.extract.job import decided, make_plan
from stellar_fast.extract.work.pipeline import Pipeline

BATCH, SECONDS, BATCHES = 32, 0.08, 20
PATIENCE = 120  # seconds for what happens at once on a machine that is not busy


def pipeline_of(tmp_path, engine, **arguments):
    """A pipeline that reads and writes nothing, and the images of its one partition."""
    touch(tmp_path, *(f"{number:04}.jpg" for number in range(BATCH * BATCHES)))
    dummies = {"dummy_reader": True, "dummy_writer": True}
    job = make_job(tmp_path, "nowhere", batch_size=BATCH, **dummies | arguments)
    plan = make_plan(job, decided(job, engine))
    return job, plan


def device_like(engine, work):
    """An engine that needs none of the CPU while it works, as on a GPU: it calls `work`."""
    features = {}

    def encode(images, **arguments):
        if len(images) not in features:
            features[len(images)] = engine.encode(images, **arguments)
        if len(images):
            work()
        return features[len(images)]

    return Wrapped(engine, encode)


def test_the_engine_finds_its_next_batch_when_it_has_done_one(tmp_path):
    """And between the two there is next to nothing: least of all the gaps, as a machine that is
    busy widens most of them."""
    begun, ended = [], []

    def work():
        begun.append(time.perf_counter())
        time.sleep(SECONDS)
        ended.append(time.perf_counter())

    engine = device_like(small_engine(), work)
    job, plan = pipeline_of(tmp_path, engine)
    with Pipeline(job, plan, engine) as pipeline:
        (manifest,) = pipeline.run({0: None})
    assert manifest["rows"] == BATCH * BATCHES
    assert len(begun) == BATCHES
    gaps = [next - end for end, next in zip(ended[:-1], begun[1:], strict=True)]
    assert min(gaps) <= 0.05 * SECONDS


def test_decoding_and_writing_go_on_while_the_engine_works(tmp_path, monkeypatch):
    """It works until two more batches are there, and until what it gave before is written."""
    from stellar_fast.extract.output.partition import Unwritten

    written = threading.Semaphore(0)
    monkeypatch.setattr(Unwritten, "append", lambda *arguments: written.release())
    batches = 0

    def work():
        nonlocal batches
        batches += 1
        patience = time.monotonic() + PATIENCE
        while pipeline._feed.qsize() < min(2, BATCHES - batches):
            assert time.monotonic() < patience, "no batch is made while the engine works"
            time.sleep(0.001)
        if batches > 1:
            assert written.acquire(timeout=PATIENCE), "nothing is written while the engine works"

    engine = device_like(small_engine(), work)
    job, plan = pipeline_of(tmp_path, engine)
    with Pipeline(job, plan, engine) as pipeline:
        list(pipeline.run({0: None}))
    assert batches == BATCHES


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
    from stellar_fast.extract.output.partition import Unwritten

    monkeypatch.setattr(Unwritten, "append", lambda *arguments: time.sleep(3 * SECONDS))
    engine = device_like(small_engine(), lambda: None)
    job, plan = pipeline_of(tmp_path, engine)
    taken = []
    few = replace(job, items=job.items[: 12 * BATCH])
    with Pipeline(
        few, plan, engine, report=lambda images, failed, seconds: taken.append(seconds)
    ) as pipeline:
        list(pipeline.run({0: None}))
    summary = Summary()
    for seconds in taken[1:]:  # before the first, processes start
        summary.add(seconds)
    assert summary.limit == "write"
