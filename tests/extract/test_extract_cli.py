"""`stellar-fast extract`, on checkpoints of a small model."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, invoke, refused, small, write_models
from extracting import contents, feature, index, parts
from pictures import photograph
from scenes import write_photographs

import stellar_fast
from stellar_fast import cli, console, extracting
from stellar_fast.extract import failures, job, stats
from stellar_fast.images.presets import load_image

BATCH = 16


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("repo"), tokenizer=False)


@pytest.fixture
def picture(tmp_path) -> Path:
    photograph(300, 200).save(tmp_path / "photograph.jpg")
    return tmp_path / "photograph.jpg"


# Every kind of photograph there is, and every kind of broken file among them

GOOD, BROKEN = 45, 5


@pytest.fixture(scope="module")
def extracted(repo, tmp_path_factory):
    """(photographs, the broken ones' names, output, finished process)."""
    root = tmp_path_factory.mktemp("acceptance")
    photographs = write_photographs(root / "photographs", good=GOOD, broken=BROKEN)
    found = (path.relative_to(photographs).as_posix() for path in photographs.rglob("*-broken.*"))
    broken = sorted(found)
    assert len(broken) == BROKEN
    output = root / "features"
    arguments = ("extract", photographs, output, *small(repo), "--batch-size", BATCH)
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=root)
    return photographs, broken, output, done


def test_exit_status_and_summary_say_that_some_failed(extracted):
    _, _, output, done = extracted
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(
        rf"{output}: {GOOD + BROKEN} images, {GOOD} rows, {BROKEN} failed, [\d.]+ s, "
        r"[\d.]+ images/s\n"
        r"  read [\d.]+ s, decode [\d.]+ s, wait [\d.]+ s, encode [\d.]+ s, blocked [\d.]+ s, "
        r"write [\d.]+ s \(\d+ decoding\); limited by \w+\n",
        done.stdout,
    )
    assert "index.parquet" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_rows_equal_encode_on_the_same_pixels(extracted, repo):
    photographs, broken, output, _ = extracted
    table = index(output)
    good = [name for name, row in zip(table["id"], table["row"], strict=True) if row is not None]
    assert len(good) == GOOD
    assert not set(good) & set(broken)
    (made,) = {
        json.loads((p / "manifest.json").read_text())["made"]["backend"]
        for p in output.glob("part-*")
    }
    engine = stellar_fast.load("small", repo=repo, precision="fp32", device="cpu", backend=made)
    pixels = torch.stack([load_image(photographs / path, "card") for path in good])
    parts = [engine.encode(part, outputs=("sparse", "cls")) for part in pixels.split(BATCH)]
    for name in ("sparse", "cls"):
        stored = feature(output, name)
        assert stored.dtype == np.float32
        together = torch.cat([part[name] for part in parts]).numpy()
        np.testing.assert_array_equal(stored, together)
        # Rows are far apart, so a shifted row would show.
        alone = engine.encode(pixels[37:38], outputs=(name,))[name][0].numpy()
        distances = np.abs(stored - alone).max(axis=(1, 2))
        assert distances.argmin() == 37
        assert distances[37] < 1e-4 * np.abs(alone).max() < np.delete(distances, 37).min()


def test_the_broken_files_are_lines_with_reasons(extracted):
    photographs, broken, output, _ = extracted
    table = index(output)
    assert table["id"] == sorted(
        path.relative_to(photographs).as_posix() for path in photographs.rglob("*.*")
    )
    failed = {
        path: reason
        for path, status, reason in zip(table["id"], table["status"], table["reason"], strict=True)
        if status == "failed"
    }
    assert sorted(failed) == broken
    assert all(failed.values())
    assert [row for row in table["row"] if row is not None] == list(range(GOOD))
    facts = json.loads((output / "stats.json").read_text())
    assert (facts["images"], facts["rows"], facts["failed"]) == (GOOD + BROKEN, GOOD, BROKEN)
    facts = json.loads((output / "plan.json").read_text())
    assert facts["configuration"]["model"]["name"] == "small"


# The command, which comes to a halt in the middle of its work: it says so, and waits.
HALTING = """
import signal, sys, time
from pathlib import Path
from stellar_fast.cli import main
from stellar_fast.extract.stats import Progress

update = Progress.update
def halt(*arguments):
    update(*arguments)
    if list(Path(sys.argv[3]).glob("part-*")):
        print("half-way", flush=True)
        time.sleep(3600)
Progress.update = halt
# A background job of a shell, and so what it starts, would ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_an_interrupted_command_goes_on_from_whole_partitions(extracted, repo, tmp_path, devices):
    photographs, _, whole, _ = extracted
    output = tmp_path / "out"
    arguments = ("extract", photographs, output, *small(repo)[:-2], "--devices", devices)
    sizes = ("--batch-size", 2, "--partition-size", 8)
    started = [sys.executable, "-P", "-c", HALTING, *map(str, arguments + sizes)]
    with subprocess.Popen(
        started,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "half-way\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        _, stderr = process.communicate()
    assert process.returncode == console.INTERRUPTED, stderr
    assert stderr == (
        "complete parts stay: the same command goes on from there\nerror: interrupted\n"
    )
    assert not [name for name in os.listdir(output) if "partial" in name]
    assert 1 <= len(parts(output)) < 7
    done = invoke(*arguments, *sizes)
    assert done.exit_code == cli.SOME_FAILED, done.output
    assert "images were done by earlier or other runs" in done.stdout
    assert index(output)["id"] == index(whole)["id"]
    for name in ("sparse", "cls"):
        np.testing.assert_allclose(feature(output, name), feature(whole, name), atol=1e-4)
    again = invoke("extract", photographs, output, *small(repo))
    assert again.exit_code == cli.SOME_FAILED
    assert (
        again.stdout
        == f"{output}: nothing to do; {GOOD + BROKEN} images were done by earlier or other runs\n"
    )


# extract


def test_all_good_is_exit_status_0(repo, picture, tmp_path):
    result = invoke("extract", tmp_path, tmp_path / "out", *small(repo), "--features", "spatial")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert sorted(os.listdir(tmp_path / "out" / "part-00000")) == [
        *("index.parquet", "manifest.json", "spatial.npy")
    ]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    digest = hashlib.sha256((repo / "small.safetensors").read_bytes()).hexdigest()
    assert plan["configuration"]["weights"] == f"sha256:{digest}"
    assert plan["configuration"]["precision"] == "fp32"
    backend = plan["facts"].pop("backend")
    assert backend in ("openvino", "torch")
    assert plan["facts"] == {"repo": str(repo), "revision": None}


def test_every_option_reaches_its_place(repo, picture, tmp_path, monkeypatch):
    loaded, planned = {}, {}
    load, make_job = stellar_fast.load, job.make_job
    monkeypatch.setattr(
        stellar_fast.loading, "load", lambda *a, **k: (loaded.update(k), load(*a, **k))[1]
    )
    monkeypatch.setattr(
        extracting, "make_job", lambda *a, **k: (planned.update(k), make_job(*a, **k))[1]
    )
    arguments = "--dtype float16 --batch-size 5 --preset eval --precision bf16 --workers 3"
    flags = "--features cls,dense --overwrite --local-files-only --revision main --device cpu"
    more = "--format parquet --partition-size 9 --on-error record --max-errors 8 --dummy-reader"
    limits = "--max-pixels 1000000 --decode-seconds 9 --worker-memory 3000"
    allow = "--allow-host nas:80 --allow-protocol ftp --allow-host other --skip-duplicates"
    result = invoke(
        *("extract", tmp_path, tmp_path / "out", "--repo", repo, "--model", "small"),
        *f"{arguments} {flags} {more} {limits} {allow}".split(),
    )
    assert result.exit_code == 0, result.output
    assert planned == {
        "features": ["cls", "dense"],
        "dtype": "float16",
        "preset": "eval",
        "scaled_decode": False,
        "format": "parquet",
        "batch_size": 5,
        "partition_size": 9,
        "column": None,
        "id_column": None,
        "keep": [],
        "skip_duplicates": True,
        "workers": 3,
        "on_error": "record",
        "max_errors": 8,
        "retry_failed": False,
        "partitions": "1/1",
        "resume": False,
        "overwrite": True,
        "dummy_reader": True,
        "dummy_writer": False,
        "max_pixels": 1_000_000,
        "decode_seconds": 9.0,
        "worker_memory": 3000,
        "allow_protocol": ["ftp"],
        "allow_host": ["nas:80", "other"],
    }
    assert loaded == {
        "repo": str(repo),
        "weights": "pretrained",
        "precision": "bf16",
        "device": "cpu",
        "max_batch": 5,
        "revision": "main",
        "local_files_only": True,
    }


def test_synthetic_weights_say_so(repo, picture, tmp_path):
    arguments = ("extract", tmp_path, tmp_path / "out", *small(repo), "--weights", "synthetic")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "synthetic" in result.stderr
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["configuration"]["weights"] == "synthetic"
    assert set(plan["facts"]) == {"backend"}


def test_a_plan_and_then_its_shares(repo, extracted, tmp_path):
    photographs, _, _, _ = extracted
    arguments = ("extract", photographs, tmp_path / "out", *small(repo))
    planned = invoke(*arguments, "--plan-only", "--partition-size", 20, "--batch-size", 16)
    assert planned.stdout == f"{tmp_path / 'out'}: {GOOD + BROKEN} images in 3 partitions\n"
    assert parts(tmp_path / "out") == []
    for k in (1, 2):
        done = invoke(*arguments, "--resume", "--partitions", f"{k}/2")
        assert done.exit_code == cli.SOME_FAILED, done.output
    assert len(parts(tmp_path / "out")) == 3
    before = contents(tmp_path / "out")
    assert invoke(*arguments, "--resume", "--retry-failed").exit_code == cli.SOME_FAILED
    assert contents(tmp_path / "out") == before


def test_ray_is_handed_the_job_and_chooses_devices_itself(repo, picture, tmp_path, monkeypatch):
    from stellar_fast.extract import Summary, ray_runner

    told = {}

    def run(given, load, **arguments):
        told.update(arguments, engine=load(device=None), output=given.output)
        return Summary(images=2, rows=1, seconds=dict.fromkeys((*stats.STAGES, "total"), 1))

    monkeypatch.setattr(ray_runner, "run", run)
    monkeypatch.setattr(failures, "told_failures", lambda output, held: [])  # there is none
    arguments = ("extract", tmp_path, tmp_path / "out", "--repo", repo, "--model", "small")
    result = invoke(*arguments, "--ray", "head:6379", "--workers", 3, "--log-seconds", 7)
    assert result.exit_code == cli.SOME_FAILED, result.output
    assert (told["address"], told["workers"], told["log_seconds"]) == ("head:6379", 3, 7)
    assert told["engine"].config.name == "small"
    assert told["output"] == tmp_path / "out"
    refused(invoke(*arguments, "--ray", "local", "--devices", "cpu"), "leave --devices out")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--features", "sparse,lowrank"), "spatial @ sparse"),
        (("--dtype", "float64"), "float64"),
        (("--batch-size", "0"), "batch size"),
        (("--preset", "crop"), "crop"),
        (("--model", "smal"), "smal"),
        (("--device", "toaster"), "toaster"),
        (("--precision", "fp4"), "fp4"),
        (("--weights", "random"), "random"),
        (("--partitions", "2"), "K/N"),
        (("--partitions", "a/b"), "K/N"),
        (("--devices", "cpu,toaster"), "toaster"),
    ],
)
def test_wrong_arguments_are_one_line(repo, picture, tmp_path, arguments, pattern):
    result = invoke("extract", tmp_path, tmp_path / "out", *small(repo), *arguments)
    refused(result, pattern)
    assert not (tmp_path / "out").exists()
