"""Extraction whose processes are killed: nothing lost, nothing doubled, nothing that looks finished
and is not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from engines import small_engine
from extracting import (
    SMALL_PARTS,
    Wrapped,
    contents,
    deadly_work,
    false_start,
    index,
    load_small,
    parts,
)
from pictures import photograph
from scenes import write_photographs

from stellar_fast import StellarError
from stellar_fast.extract import (
    Pipeline,
    Stopped,
    identify,
    plan,
    prepare,
    run,
    run_devices,
    workers,
)
from stellar_fast.extract.stats import Progress

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, good=60, broken=6)
    return root


@pytest.fixture(scope="module")
def whole(photographs, engine, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(plan(photographs, output, **SMALL_PARTS), engine)
    return contents(output)


class Driver:
    """Extractions in children of another process, see `extract_driver.py`."""

    def __init__(self, photographs: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(TESTS / "extract_driver.py"), photographs],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "golden")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def extract(self, output: Path, kill_after: float | None = None) -> int:
        """How the child ended: 0, or less a signal's number."""
        self.process.stdin.write(f"{output}\n")
        self.process.stdin.flush()
        child = psutil.Process(int(self.process.stdout.readline()))
        if kill_after is not None:
            time.sleep(kill_after)
            try:
                others = child.children(recursive=True)
                child.kill()
            except psutil.NoSuchProcess:
                others = []
            _, alive = psutil.wait_procs(others, timeout=20)
            assert alive == [], "processes outlive the one that started them"
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


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
            for part in parts(output):  # whatever has its name is whole
                for path in part.iterdir():
                    name = path.relative_to(output).as_posix()
                    if path.name != "manifest.json":
                        assert path.read_bytes() == expected[name]
                assert (part / "manifest.json").is_file()
    finally:
        driver.close()


def test_killed_at_random_moments_a_run_goes_on_to_the_same_files(photographs, tmp_path):
    kill_at_random(photographs, tmp_path, kills=8, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_fifty_times_a_run_goes_on_to_the_same_files(photographs, tmp_path):
    kill_at_random(photographs, tmp_path, kills=50, seed=time.time_ns())


# Decoding processes


def test_killed_decoding_processes_lose_no_image(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    job = plan(photographs, output, workers=2, **SMALL_PARTS)
    made = prepare(job, identify(engine), engine.max_batch)
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

    pipeline = Pipeline(output, made, Wrapped(engine, encode), job.options)
    with pipeline:
        manifests = list(pipeline.run(range(len(made.partitions))))
    assert [manifest["partition"] for manifest in manifests] == list(range(9))
    assert contents(output) == whole
    assert len(killed) == 2


def test_an_image_that_kills_its_process_twice_is_a_failed_row(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(workers, "work", deadly_work)
    for name in ("a", "b", "c-deadly", "d", "e-deadly", "f"):
        photograph(60, 50, seed=ord(name[0])).save(tmp_path / f"{name}.png")
    run(plan(tmp_path, tmp_path / "out", batch_size=8, workers=1), engine)
    table = index(tmp_path / "out")
    reason = "the decoding process died (SIGKILL), twice"
    assert table["reason"] == [None, None, reason, None, reason, None]
    assert table["row"] == [0, 1, None, 2, None, 3]


def test_an_image_that_never_ends_is_a_failed_row(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(workers, "work", deadly_work)
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    for name in ("a", "b-endless", "c"):
        photograph(60, 50, seed=ord(name[0])).save(tmp_path / f"{name}.png")
    run(plan(tmp_path, tmp_path / "out", batch_size=8, workers=2, decode_seconds=2), engine)
    table = index(tmp_path / "out")
    assert table["reason"] == [None, "reading took more than 1 s, twice", None]


def test_processes_that_never_start_are_an_error(photographs, tmp_path, engine, monkeypatch):
    monkeypatch.setattr(workers, "work", false_start)
    with pytest.raises(StellarError, match=r"exit status 7.*before it was ready, 3 times"):
        run(plan(photographs, tmp_path / "out"), engine)


def test_a_pipeline_can_be_stopped_from_another_thread(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    job = plan(photographs, output, **SMALL_PARTS)
    made = prepare(job, identify(engine), engine.max_batch)
    with Pipeline(output, made, engine, job.options) as pipeline:
        found = pipeline.run(range(9))
        next(found)
        threading.Thread(target=pipeline.stop).start()
        with pytest.raises(Stopped):
            list(found)
    assert not [name for name in os.listdir(output) if "partial" in name]
    run(job, engine)
    assert contents(output) == whole


def test_memory_does_not_grow_with_the_number_of_images(photographs, tmp_path, engine):
    """The last of many partitions takes no more memory than the third."""
    paths = sorted(path for path in photographs.rglob("*.*") if "broken" not in path.name)
    for number in range(30):
        for path in paths[:20]:
            (tmp_path / "many" / str(number)).mkdir(parents=True, exist_ok=True)
            os.link(path, tmp_path / "many" / str(number) / path.name)
    job = plan(tmp_path / "many", tmp_path / "out", partition_size=40, batch_size=8)
    made = prepare(job, identify(engine), engine.max_batch)
    used = []
    with Pipeline(job.output, made, engine, job.options) as pipeline:
        for _ in pipeline.run(range(15)):
            processes = [os.getpid(), *pipeline.pids]
            used.append([psutil.Process(pid).memory_info().rss for pid in processes])
    for early, late in zip(used[4], used[-1], strict=True):
        assert late < early + 20 * 2**20


# One process a device


def test_several_devices_give_the_same_files_as_one(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    summary = run_devices(plan(photographs, output, **SMALL_PARTS), load_small, ["cpu", "cpu"])
    assert (summary.images, summary.failed, summary.partitions) == (66, 6, 9)
    assert contents(output) == whole
    assert summary.seconds["encode"] > 0
    job = plan(photographs, tmp_path / "none", dummy_writer=True, **SMALL_PARTS)
    assert run_devices(job, load_small, ["cpu", "cpu"]).images == 66


def test_a_device_that_dies_is_an_error_and_the_run_goes_on_later(
    photographs, tmp_path, engine, whole
):
    output = tmp_path / "out"
    job = plan(photographs, output, **SMALL_PARTS)
    with pytest.raises(StellarError, match=r"the process for mortal died \(SIGKILL\)"):
        run_devices(job, load_small, ["cpu", "mortal"])
    with pytest.raises(ValueError, match="no such device"):
        run_devices(job, load_small, ["cpu", "toaster"])
    assert len(parts(output)) < 9
    run(plan(photographs, output, **SMALL_PARTS), engine)
    assert contents(output) == whole


def test_too_many_failures_on_several_devices_are_an_error(photographs, tmp_path):
    job = plan(photographs, tmp_path / "out", max_errors=4, **SMALL_PARTS)
    with pytest.raises(StellarError, match=r"images failed, more than --max-errors 4"):
        run_devices(job, load_small, ["cpu", "cpu"])


def test_an_interruption_stops_devices_in_the_middle_of_a_partition(
    photographs, tmp_path, monkeypatch
):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    output = tmp_path / "out"
    job = plan(photographs, output, batch_size=2)  # a minute of work on devices that are slow
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_devices(job, load_small, ["slow", "slow"])
    assert time.perf_counter() - start < 40
    assert sorted(os.listdir(output)) == [".lock", "inputs.parquet", "plan.json", "stats.json"]
