"""Extraction on Ray: the same bytes as without it, whoever is killed.

What needs a cluster starts one, whose processes import torch, and is slow; the rest plays Ray in
this process.
"""

import functools
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from extracting import SMALL_PARTS, SUPPORT, Wrapped, contents, load_small
from pictures import photograph

import stellar_fast
from stellar_fast.errors import MissingExtraError, StellarError
from stellar_fast.extract import make_job, ray_runner, ray_session, run
from stellar_fast.extract.output.layout import complete, read_plan

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

PICTURES = 44


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for at in range(PICTURES):
        path = folder / f"{at:02d}.png"
        if at % 7 == 3:
            path.write_bytes(b"no picture")
        else:
            photograph(40, 30, seed=at).save(path)
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> Path:
    """What one process makes of the pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as an engine has: sums may depend on it
    try:
        output = tmp_path_factory.mktemp("plain") / "out"
        run(make_job(folder, output, **SMALL_PARTS), load_small("cpu"))
    finally:
        torch.set_num_threads(threads)
    return output


@pytest.fixture(scope="module")
def cluster():
    """One session of Ray for all tests, with two cores and so room for two engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SUPPORT))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            "local",
            num_cpus=2,
            object_store_memory=ray_session.OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def on_a_cluster(test):
    return pytest.mark.slow(pytest.mark.usefixtures("cluster")(test))


class Told(list):
    """What the processes tell, as `ray.util.queue.Queue` has it."""

    put, qsize = list.append, list.__len__

    def get_nowait_batch(self, count):
        found, self[:count] = self[:count], []
        return found


@pytest.fixture
def played(monkeypatch):
    """Ray with one node of two cores, in this process: what was asked of it for each task."""
    asked = []
    rays = ray.remote

    def remote(*functions, **resources):
        if functions or "max_calls" not in resources:  # Ray's own
            return rays(*functions, **resources)
        asked.append(resources)
        return lambda function: SimpleNamespace(remote=function)

    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray, "wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
    monkeypatch.setattr(ray, "cancel", lambda task: None)
    monkeypatch.setattr("ray.util.queue.Queue", lambda actor_options: Told())
    return SimpleNamespace(asked=asked, node=node)


def load(marks: Path, what: str, device: str | None):
    """An engine that leaves a mark of its process and may be made to misbehave."""
    assert device is None
    engine = load_small("cpu")
    batches = 0

    def encode(images, **named):
        nonlocal batches
        batches += len(images) > 0
        if batches:
            (marks / f"worked-{os.getpid()}").touch()
        if batches and what == "both":  # neither goes on before the other has begun
            patience = time.monotonic() + 300
            while len(list(marks.glob("worked-*"))) < 2 and time.monotonic() < patience:
                time.sleep(0.02)
        if batches == 4 and what == "die":  # in the middle of this process's second partition
            try:
                (marks / "died").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        if batches == 4 and what == "fail":
            raise StellarError("the disk is full")
        return engine.encode(images, **named)

    return Wrapped(engine, encode)


def extract(folder: Path, output: Path, marks: Path, what: str = "", **options):
    marks.mkdir(exist_ok=True)
    job = make_job(folder, output, **SMALL_PARTS, **options)
    return ray_runner.run(job, functools.partial(load, marks, what), engines=2, workers=1)


@on_a_cluster
def test_two_engines_make_the_same_bytes(folder, expected, tmp_path):
    summary = extract(folder, tmp_path / "out", tmp_path / "marks", "both")
    assert contents(tmp_path / "out") == contents(expected)
    assert (summary.images, summary.failed, summary.partitions) == (PICTURES, 6, 6)
    assert summary.engines == 2
    assert summary.seconds["encode"] > 0
    workers = {path.name for path in (tmp_path / "marks").glob("worked-*")}
    assert len(workers) == 2
    assert f"worked-{os.getpid()}" not in workers
    stellar_fast.open_features(tmp_path / "out").verify()


@on_a_cluster
def test_a_process_killed_in_the_middle_loses_nothing(folder, expected, tmp_path):
    summary = extract(folder, tmp_path / "out", tmp_path / "marks", "die")
    assert (tmp_path / "marks" / "died").exists()
    assert contents(tmp_path / "out") == contents(expected)
    assert summary.images == PICTURES
    # The process that takes its place may find that all is done.
    assert len(list((tmp_path / "marks").glob("worked-*"))) in (2, 3)
    assert list((tmp_path / "out").glob(".part-*")) == []


def test_the_bytes_are_those_without_ray(folder, expected, tmp_path, played, capsys):
    summary = extract(folder, tmp_path / "out", tmp_path / "marks")
    assert contents(tmp_path / "out") == contents(expected)
    assert (summary.images, summary.failed, summary.partitions) == (PICTURES, 6, 6)
    assert (summary.engines, summary.workers) == (2, 2)
    assert summary.seconds["encode"] > 0
    task = {"num_cpus": 1, "num_gpus": 0, "max_calls": 1, "max_retries": -1}
    assert played.asked == [task] * 3
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("waiting for Ray to start a process with 1 core")
    played.node["Resources"] = {"CPU": 2.0, "GPU": 2.0}
    extract(folder, tmp_path / "again", tmp_path / "marks")
    assert played.asked[3] == {**task, "num_gpus": 1}


def test_an_error_of_an_engine_is_the_callers(folder, tmp_path, played):
    output = tmp_path / "out"
    with pytest.raises(StellarError, match="the disk is full"):
        extract(folder, output, tmp_path / "marks", "fail")
    assert list(complete(output, read_plan(output))) == [0, 1]  # the first of each process
    assert '"outcome": "error: the disk is full"' in (output / "stats.json").read_text()
    assert list(output.glob(".part-*")) == []


@on_a_cluster
def test_an_error_is_the_callers_and_what_is_complete_stays(folder, expected, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(StellarError, match="the disk is full"):
        extract(folder, output, tmp_path / "marks", "fail")
    # A partition may have been at its last step; one that goes on makes all six.
    done, before = complete(output, read_plan(output)), None
    while done != before:
        time.sleep(2)
        done, before = complete(output, read_plan(output)), done
    assert 0 < len(done) < 6, "an engine goes on after the error"
    assert '"outcome": "error: the disk is full"' in (output / "stats.json").read_text()
    summary = run(make_job(folder, output, **SMALL_PARTS), load_small("cpu"))  # without Ray
    assert summary.partitions == 6 - len(done)
    stellar_fast.open_features(output).verify()


def test_failures_are_counted_over_all_engines(folder, tmp_path, played):
    with pytest.raises(StellarError, match=r"[45] images failed, more than --max-errors 3"):
        extract(folder, tmp_path / "out", tmp_path / "marks", max_errors=3)
    assert extract(folder, tmp_path / "more", tmp_path / "marks", max_errors=6).failed == 6


def test_engines_that_differ_are_refused(folder, tmp_path):
    """As "auto" differs between kinds of GPU."""
    output = tmp_path / "out"
    run(make_job(folder, output, **SMALL_PARTS), load_small("cpu"))
    shutil.rmtree(output / "part-00002")

    def load_other(device):
        engine = load_small("cpu")
        engine.precision = "bf16"
        return engine

    with pytest.raises(StellarError, match=r'precision ."fp32" -> "bf16".; give'):
        work_alone(make_job(folder, output, **SMALL_PARTS), load_other)
    assert not (output / "part-00002").exists()


def test_failed_images_are_tried_again(folder, tmp_path, played):
    moved = tmp_path / "photographs"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    run(make_job(moved, tmp_path / "out", **SMALL_PARTS), load_small("cpu"))
    photograph(40, 30, seed=3).save(moved / "03.png")
    summary = extract(moved, tmp_path / "out", tmp_path / "marks", retry_failed=True)
    assert summary.all_failed == 5
    features = stellar_fast.open_features(tmp_path / "out")
    assert len(features) == PICTURES - 5
    assert "03.png" in features.ids


def work_alone(job, load) -> list:
    """What the process of an engine tells, in this process."""
    told = []
    share = ray_runner._Share(engines=1, cpus=1, gpus=0)
    plan = read_plan(job.output)
    ray_runner._work(job, plan, load, dict.fromkeys(range(6)), share, told.append)
    return told


def test_a_repeated_task_leaves_what_the_dead_process_finished(folder, expected):
    assert work_alone(make_job(folder, expected, **SMALL_PARTS), load_small) == []


def test_an_output_that_the_nodes_do_not_see(folder, expected, tmp_path):
    job = make_job(folder, tmp_path / "out", **SMALL_PARTS)
    share = ray_runner._Share(engines=1, cpus=1, gpus=0)
    with pytest.raises(StellarError, match="not to be seen from a node of the Ray cluster"):
        ray_runner._work(job, read_plan(expected), load_small, {}, share, print)


@on_a_cluster
def test_what_ray_cannot_mend_is_one_line(folder, tmp_path):
    """Such as a node without this package."""

    class Unknown:
        def __reduce__(self):
            return __import__, ("a_module_that_no_node_has",)

    job = make_job(folder, tmp_path / "out", **SMALL_PARTS)
    with pytest.raises(StellarError, match=r"a_module_that_no_node_has.*every node") as caught:
        ray_runner.run(job, functools.partial(load_small, Unknown()), engines=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "engines", "share"),
    [
        ([{"CPU": 16, "GPU": 2}, {"CPU": 12, "GPU": 2}], None, (4, 6, 1)),
        ([{"CPU": 16, "GPU": 2}], 1, (1, 8, 1)),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], None, (1, 8, 1)),  # the node without GPUs is left out
        ([{"CPU": 2, "GPU": 8}], None, (8, 0, 1)),
        ([{"CPU": 8}, {"CPU": 8}], None, (2, 8, 0)),
        ([{"CPU": 16}, {"CPU": 8}, {}], None, (2, 8, 0)),
        ([{"CPU": 8}], 3, (3, 2, 0)),
        ([{"CPU": 2}], 2, (2, 1, 0)),
    ],
)
def test_engines_fit_on_the_nodes(nodes, engines, share, monkeypatch):
    found = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 99, "GPU": 9}}
    monkeypatch.setattr(ray, "nodes", lambda: [*found, dead])
    assert ray_runner._share_out(engines) == ray_runner._Share(*share)


def test_more_engines_than_there_is_room_for(folder, tmp_path, played):
    job = make_job(folder, tmp_path / "out", **SMALL_PARTS)
    with pytest.raises(ValueError, match="3 engines, but the Ray cluster has 2 cores"):
        ray_runner.run(job, load_small, engines=3)
    played.node["Resources"] = {"CPU": 8.0, "GPU": 1.0}
    with pytest.raises(ValueError, match="2 engines, but the Ray cluster has 1 GPUs"):
        ray_runner.run(job, load_small, engines=2)
    assert not (tmp_path / "out").exists()


def test_arguments(folder, tmp_path):
    job = make_job(folder, tmp_path / "out", **SMALL_PARTS)
    with pytest.raises(ValueError, match="the number of engines must be at least 1, got 0"):
        ray_runner.run(job, load_small, engines=0)
    with pytest.raises(ValueError, match="the number of workers must be at least 1, got -1"):
        ray_runner.run(job, load_small, workers=-1)
    dummy = make_job(folder, tmp_path / "out", dummy_writer=True, **SMALL_PARTS)
    with pytest.raises(ValueError, match="measures one machine"):
        ray_runner.run(dummy, load_small)


def test_without_ray(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[ray\]"):
        ray_runner.run(make_job(folder, tmp_path / "out", **SMALL_PARTS), load_small)
