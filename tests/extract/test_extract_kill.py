"""Extraction whose processes are killed: nothing lost, nothing doubled, nothing that looks finished
and is not."""

import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from extracting import (
    SMALL_PARTS,
    Wrapped,
    contents,
    deadly_work,
    false_start,
    index,
    load_marking_its_end,
    load_small,
    parts,
)
from killing import Driver, assert_whole
from pictures import photograph
from scenes import write_photographs
from threads import in_threads

from stellar_fast import StellarError
from stellar_fast.extract import make_job, run, run_devices
from stellar_fast.extract.job import decided, make_plan
from stellar_fast.extract.output import folder
from stellar_fast.extract.stats import Progress
from stellar_fast.extract.work import workers
from stellar_fast.extract.work.pipeline import Pipeline, Stopped


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), good=60, broken=6)


@pytest.fixture(scope="module")
def whole(photographs, engine, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(make_job(photographs, output, **SMALL_PARTS), engine)
    return contents(output)


# Before the list of images has its name; before the plan has. Then of the first partition: before
# its index is on the disk; before its folder is; before it has its name; before that is on disk.
STEPS = (2, 4, 3, 5, 6, 7)


@pytest.mark.parametrize("steps", [STEPS, pytest.param(range(1, 15), marks=pytest.mark.slow)])
def test_killed_at_every_step_to_the_disk_a_run_goes_on_to_the_same_files(
    photographs, tmp_path, whole, steps
):
    driver = Driver(photographs)
    try:
        for step in steps:
            assert driver.extract(tmp_path / "out", step=step) == -signal.SIGKILL
            assert_whole(tmp_path / "out", whole)
        assert [path.name for path in parts(tmp_path / "out")][:1] == ["part-00000"]
        assert driver.extract(tmp_path / "out") == 0
    finally:
        driver.close()
    assert contents(tmp_path / "out") == whole


def kill_at_random(photographs: Path, root: Path, kills: int, seed: int) -> None:
    """Kills extractions at random moments and goes on with them, and compares those that end."""
    driver = Driver(photographs)
    try:
        assert driver.extract(root / "whole") == 0
        expected = contents(root / "whole")
        start = time.perf_counter()
        assert driver.extract(root / "timed") == 0
        seconds = time.perf_counter() - start
        rng = random.Random(seed)
        killed, ended, number = 0, 0, 0
        while killed < kills or not ended:
            output = root / f"out-{number}"
            code = driver.extract(output, rng.uniform(0.05, seconds) if killed < kills else None)
            if code == 0:
                assert contents(output) == expected
                shutil.rmtree(output)
                ended, number = ended + 1, number + 1
                continue
            assert code == -signal.SIGKILL
            killed += 1
            assert_whole(output, expected)
    finally:
        driver.close()


@pytest.mark.slow
def test_killed_at_random_moments_a_run_goes_on_to_the_same_files(photographs, tmp_path):
    kill_at_random(photographs, tmp_path, kills=8, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_fifty_times_a_run_goes_on_to_the_same_files(photographs, tmp_path):
    kill_at_random(photographs, tmp_path, kills=50, seed=time.time_ns())


# Decoding processes


def test_killed_decoding_processes_lose_no_image(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    job = make_job(photographs, output, workers=2, **SMALL_PARTS)
    plan = make_plan(job, decided(job, engine))
    killed = []
    encoded = 0

    def encode(images, **arguments):
        nonlocal encoded
        # Images are at most 12 slots and 4 batches ahead of the engine: none is hit twice, which
        # would make it a failed row.
        if len(images) and encoded >= 30 * len(killed):
            killed.append(pipeline.pids[len(killed) % 2])
            os.kill(killed[-1], signal.SIGKILL)
        encoded += len(images)
        return engine.encode(images, **arguments)

    pipeline = Pipeline(job, plan, Wrapped(engine, encode))
    with pipeline:
        manifests = list(pipeline.run(dict.fromkeys(range(len(plan.partitions)))))
    assert [manifest["partition"] for manifest in manifests] == list(range(9))
    assert contents(output) == whole
    assert len(killed) == 2


def test_an_image_that_kills_its_process_twice_is_a_failed_row(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(workers, "work", deadly_work)
    for name in ("a", "b", "c-deadly", "d", "e-deadly", "f"):
        photograph(60, 50, seed=ord(name[0])).save(tmp_path / f"{name}.png")
    run(make_job(tmp_path, tmp_path / "out", batch_size=8, workers=1), engine)
    table = index(tmp_path / "out")
    reason = "the decoding process died (SIGKILL), twice"
    assert table["reason"] == [None, None, reason, None, reason, None]
    assert table["row"] == [0, 1, None, 2, None, 3]


def test_an_image_that_never_ends_is_a_failed_row(tmp_path, engine, monkeypatch):
    """On a clock that stands still, but for when an image has begun that never ends and whatever
    its process had to say before has been heard: then it leaps."""
    leaps = 0

    def wait(awaited, timeout):
        nonlocal leaps
        begun = len(list(tmp_path.glob("*.begun-*")))
        found = connection_wait(awaited, timeout)
        if not found and begun > leaps:
            leaps += 1
        return found

    connection_wait = workers.connection.wait
    monkeypatch.setattr(workers, "connection", SimpleNamespace(wait=wait))
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: 1000.0 * leaps))
    monkeypatch.setattr(workers, "work", deadly_work)
    for name in ("a", "b-endless", "c"):
        photograph(60, 50, seed=ord(name[0])).save(tmp_path / f"{name}.png")
    run(make_job(tmp_path, tmp_path / "out", batch_size=8, workers=1), engine)
    table = index(tmp_path / "out")
    assert table["reason"] == [None, "reading took more than 300 s, twice", None]
    assert leaps == 2


def test_processes_that_never_start_are_an_error(photographs, tmp_path, engine, monkeypatch):
    monkeypatch.setattr(workers, "work", false_start)
    with pytest.raises(StellarError, match=r"exit status 7.*before it was ready, 3 times"):
        run(make_job(photographs, tmp_path / "out"), engine)


def test_a_pipeline_can_be_stopped_from_another_thread(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL_PARTS)
    plan = make_plan(job, decided(job, engine))
    first, stopped = threading.Event(), threading.Event()

    def encode(images, **arguments):
        if first.is_set():
            stopped.wait(600)
        return engine.encode(images, **arguments)

    def stop():
        first.wait(600)
        pipeline.stop()
        stopped.set()

    with Pipeline(job, plan, Wrapped(engine, encode)) as pipeline:
        thread = threading.Thread(target=stop)
        thread.start()
        found = pipeline.run(dict.fromkeys(range(9)))
        next(found)
        first.set()
        with pytest.raises(Stopped):
            list(found)
        thread.join()
    assert not [name for name in os.listdir(output) if "partial" in name]
    run(job, engine)
    assert contents(output) == whole


def test_memory_does_not_grow_with_the_number_of_images(photographs, tmp_path, engine):
    """The last of ten partitions takes no more memory than the fourth: the pictures of those in
    between are 36 MB."""
    paths = sorted(path for path in photographs.rglob("*.*") if "broken" not in path.name)
    for number in range(20):
        for path in paths[:20]:
            (tmp_path / "many" / str(number)).mkdir(parents=True, exist_ok=True)
            os.link(path, tmp_path / "many" / str(number) / path.name)
    job = make_job(tmp_path / "many", tmp_path / "out", partition_size=40, batch_size=8)
    plan = make_plan(job, decided(job, engine))
    used = []
    with Pipeline(job, plan, engine) as pipeline:
        for _ in pipeline.run(dict.fromkeys(range(10))):
            processes = [os.getpid(), *pipeline.pids]
            used.append([psutil.Process(pid).memory_info().rss for pid in processes])
    for early, late in zip(used[3], used[-1], strict=True):
        assert late < early + 20 * 2**20


# Several processes


def test_runs_that_know_nothing_of_each_other_share_the_partitions(
    photographs, tmp_path, engine, whole
):
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL_PARTS)
    summaries = in_threads(lambda job: run(job, engine), [job] * 3)
    assert contents(output) == whole
    assert sum(summary.partitions for summary in summaries) == 9
    for summary in summaries:
        assert summary.images + summary.earlier_images + 8 * summary.elsewhere >= 66


def test_several_devices_give_the_same_files_as_one(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    load = functools.partial(load_marking_its_end, tmp_path / "end")
    summary = run_devices(make_job(photographs, output, **SMALL_PARTS), load, ["cpu", "cpu"])
    assert (summary.images, summary.failed, summary.partitions) == (66, 6, 9)
    assert contents(output) == whole
    assert summary.seconds["encode"] > 0
    assert not (tmp_path / "end").exists(), "threads of libraries may abort an interpreter's end"


def test_a_device_that_dies_is_an_error_and_the_run_goes_on_later(
    photographs, tmp_path, engine, whole
):
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL_PARTS)
    with pytest.raises(StellarError, match=r"the process for mortal died \(SIGKILL\)"):
        run_devices(job, load_small, ["mortal"])
    assert parts(output) == []
    run(make_job(photographs, output, **SMALL_PARTS), engine)
    assert contents(output) == whole


class Played:
    """What `multiprocessing.get_context` gives, for a crew whose processes are threads that each
    play a part: `part(link, device)`, with the end of a pipe that a process of a device has."""

    Pipe = staticmethod(multiprocessing.Pipe)
    exitcode = 0

    def __init__(self, part) -> None:
        self.part = part

    def Process(self, *, target, args):
        theirs, _, device, *_ = args
        link = Connection(os.dup(theirs.fileno()))  # the crew closes its own

        def play():
            with link, suppress(EOFError, ConnectionError):
                self.part(link, device)

        thread = threading.Thread(target=play, daemon=True)
        return SimpleNamespace(start=thread.start, join=thread.join, kill=lambda: None)


SIGNALS = {
    "signal": lambda *arguments: None,
    "pthread_sigmask": lambda *arguments: None,
    **{name: getattr(signal, name) for name in ("SIGINT", "SIG_IGN", "SIG_UNBLOCK")},
}


run_module = sys.modules[run.__module__]


@pytest.fixture
def play(monkeypatch):
    return lambda part: monkeypatch.setattr(
        run_module.multiprocessing, "get_context", lambda kind: Played(part)
    )


def test_too_many_failures_of_all_devices_together_are_an_error(
    photographs, tmp_path, engine, play
):
    failed = {"first": 3, "second": 2}

    def part(link, device):
        link.send(decided(job, engine))
        link.recv()
        link.send(("report", 8, failed[device], {"encode": 1.5}))
        link.send(("report", 0, 0, {"write": 0.5}))
        link.send(None)
        link.recv()

    play(part)
    job = make_job(photographs, tmp_path / "out", max_errors=4, **SMALL_PARTS)
    with pytest.raises(StellarError, match="5 images failed, more than --max-errors 4"):
        run_devices(job, load_small, list(failed))
    job = make_job(photographs, tmp_path / "out", max_errors=5, **SMALL_PARTS)
    summary = run_devices(job, load_small, list(failed))
    assert (summary.engines, summary.seconds["encode"], summary.seconds["write"]) == (2, 3.0, 1.0)


def test_engines_of_several_devices_must_be_alike(photographs, tmp_path, engine, play):
    def part(link, device):
        link.send(decided(job, engine) | {"precision": device})
        link.recv()

    play(part)
    job = make_job(photographs, tmp_path / "out", **SMALL_PARTS)
    with pytest.raises(StellarError, match=r'on fp16 differs.*precision \("bf16" -> "fp16"\)'):
        run_devices(job, load_small, ["bf16", "fp16"])
    assert not (tmp_path / "out").exists()


def given_to(job, devices, engine, play) -> dict:
    """What each device is told to make."""
    given = {}

    def part(link, device):
        link.send(decided(job, engine))
        _, given[device] = link.recv()
        link.send(None)
        link.recv()

    play(part)
    run_devices(job, load_small, devices)
    return given


def test_devices_are_given_everything_where_locks_keep_them_apart(
    photographs, tmp_path, engine, play, monkeypatch
):
    names, everything = ["one", "other"], dict.fromkeys(range(9))
    halves = {"one": everything.keys() - {1, 3, 5, 7}, "other": {1, 3, 5, 7}}
    done = tmp_path / "done"
    run(make_job(photographs, done, **SMALL_PARTS), engine)
    manifests = [json.loads((part / "manifest.json").read_text()) for part in parts(done)]

    def given(output="new", **options):
        job = make_job(photographs, tmp_path / output, **SMALL_PARTS | options)
        found = given_to(job, names, engine, play)
        return {name: wanted.keys() for name, wanted in found.items()}

    assert given() == dict.fromkeys(names, everything.keys())
    assert given(dummy_writer=True) == halves
    assert given("done") == {}, "nothing is left to start decoding processes for"
    one, other = given("done", retry_failed=True).values()
    assert one | other == {made["partition"] for made in manifests if made["failed"]}
    assert one and other and not one & other
    monkeypatch.setattr(folder.fcntl, "lockf", no_locks)
    assert given() == halves


def no_locks(*arguments) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def test_an_engine_that_cannot_be_loaded_is_the_callers_error(photographs, tmp_path, play):
    def part(link, device):
        run_module._serve(link, load_small, device, job, 1)

    job = make_job(photographs, tmp_path / "out", **SMALL_PARTS)
    play(part)
    with pytest.MonkeyPatch.context() as patched:
        # Of the main thread alone.
        patched.setattr(run_module, "signal", SimpleNamespace(**SIGNALS))
        with pytest.raises(ValueError, match="no such device"):
            run_devices(job, load_small, ["toaster"])


def test_an_interruption_stops_devices_in_the_middle_of_a_partition(
    photographs, tmp_path, monkeypatch
):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    output = tmp_path / "out"
    # Half a minute of work on a device that is slow: had it not stopped, the partition were there.
    job = make_job(photographs, output, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_devices(job, load_small, ["slow"])
    assert sorted(os.listdir(output)) == [".lock", "inputs.parquet", "plan.json", "stats.json"]
