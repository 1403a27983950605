"""The GPU benchmarks where there is no GPU: parts, bounds, result files, arithmetic, timing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_ops
import gpu_parts
import gpu_run
import pytest
import torch
from cases import cases, flops_per_image
from ceilings import Floor
from gpu_timing import sets_beyond_cache, time_in_turn
from stellar_fast.reference import ops as oracles

from stellar_fast.config import MODELS

COMMAND = [sys.executable, "-P", str(Path(gpu.__file__))]
FACTS = {"commit": "abc", "device": "fake"}
ROWS = """
import json, sys, time
done = set(json.load(sys.stdin))
for key in ("a", "b", "c", "finished"):
    if key not in done:
        with open({log!r}, "a") as file:
            file.write(key)
        print(json.dumps({{"key": key}}), flush=True)
        time.sleep({pause} if key == "b" else 0)
"""


def part(tmp_path: Path, pause: float = 0, code: str = ROWS) -> gpu.Part:
    text = code.format(log=str(tmp_path / "log"), pause=pause)
    return gpu.Part("fake", 60, (sys.executable, "-c", text))


def keys(path: Path) -> list[str]:
    return [row["key"] for row in json.loads(path.read_text())["rows"]]


def test_a_dry_run_lists_parts_and_bounds():
    done = subprocess.run([*COMMAND, "--dry-run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for item in gpu.PARTS:
        assert f"{item.name:12} at most {item.seconds:4.0f} s" in done.stdout


def test_without_a_device_there_is_one_error(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_name", lambda: None)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_package_there_is_one_error(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_name", lambda: "fake")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main([]) == 1
    error = capsys.readouterr().err
    assert "pip install" in error and error.count("\n") == 1


def test_the_test_parts_name_files_with_their_mark(monkeypatch):
    monkeypatch.setattr(gpu_parts, "has_fp8", lambda: True)
    monkeypatch.setattr(gpu_parts, "command", lambda arguments: {"arguments": arguments})
    for name, file, other in (
        ("tests", "tests/test_gpu.py", "tests/test_ray.py"),
        ("kernels", "tests/test_linear.py", "tests/test_gpu.py"),
    ):
        (job,) = gpu_parts.jobs(name)
        arguments = job.run()["arguments"]
        assert file in arguments and other not in arguments
        assert all((gpu_parts.ROOT / path).exists() for path in arguments if path.endswith(".py"))


def test_a_command_says_how_it_ended():
    row = gpu_parts.command(["-c", "print('FAILED x'); print('1 failed'); raise SystemExit(1)"])
    assert (row["summary"], row["exit"], row["failed"]) == ("1 failed", 1, "FAILED x")
    assert "failed" not in gpu_parts.command(["-c", "print('1 passed')"])


def test_more_than_nine_minutes_are_refused():
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "10", "--dry-run"])


def test_a_part_is_cut_off_in_time_and_resumed_without_repeats(tmp_path):
    path = tmp_path / "r.json"
    start = time.monotonic()
    assert not gpu.run_part(part(tmp_path, pause=60), gpu.Results(path, FACTS), 3)
    assert time.monotonic() - start < 10
    assert keys(path) == ["a", "b", "part"]
    assert gpu.run_part(part(tmp_path), gpu.Results(path, FACTS), 30)
    assert keys(path) == ["a", "b", "c", "finished"]
    assert (tmp_path / "log").read_text() == "abcfinished"
    assert gpu.run_part(part(tmp_path), gpu.Results(path, FACTS), 30)
    assert (tmp_path / "log").read_text() == "abcfinished"


def test_a_killed_run_leaves_a_true_file(tmp_path):
    path = tmp_path / "r.json"
    driver = (
        f"import sys; sys.path.append({str(Path(gpu.__file__).parent)!r})\n"
        f"import gpu, pathlib\n"
        f"p = gpu.Part('fake', 60, {part(tmp_path, pause=8).command!r})\n"
        f"gpu.run_part(p, gpu.Results(pathlib.Path({str(path)!r}), {FACTS!r}), 60)\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", driver])
    end = time.monotonic() + 60
    while not (path.exists() and keys(path) == ["a", "b"]):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert keys(path) == ["a", "b"]
    (tmp_path / "log").write_text("ab")
    assert gpu.run_part(part(tmp_path), gpu.Results(path, FACTS), 30)
    assert keys(path) == ["a", "b", "c", "finished"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("print('hello')", "no row"),
        ("pass", "without its last row"),
        ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
    ],
)
def test_a_part_that_fails_says_so_and_the_rest_goes_on(tmp_path, code, reason):
    results = gpu.Results(tmp_path / "r.json", FACTS)
    bad = gpu.Part("bad", 30, (sys.executable, "-c", code))
    assert not gpu.run([bad, part(tmp_path)], results, 1)
    rows = json.loads(results.path.read_text())["rows"]
    assert reason in rows[0]["failed"]
    assert [row["key"] for row in rows[1:]] == ["a", "b", "c", "finished"]


def test_another_commits_file_is_refused(tmp_path):
    path = tmp_path / "r.json"
    gpu.Results(path, FACTS).add("p", {"key": "k"})
    with pytest.raises(ValueError, match="was measured at commit"):
        gpu.Results(path, {**FACTS, "commit": "def"})


@pytest.mark.parametrize(
    ("model", "gflops"), [("stellar-b16", 38.35), ("stellar-l16", 133.9), ("stellar-h16", 357.0)]
)
def test_arithmetic_of_an_image(model, gflops):
    assert flops_per_image(MODELS[model]) / 1e9 == pytest.approx(gflops, rel=2e-3)


def test_floors():
    assert Floor.of(790e12, 1e9, 790e12, 4.3e12) == Floor(1.0, "flops")
    assert Floor.of(1e12, 8.6e12, 790e12, 4.3e12) == Floor(2.0, "bytes")
    (proj,) = (c for c in cases(MODELS["stellar-h16"], 64, "bf16") if c.name == "proj")
    rows = 64 * 273
    assert proj.flops == 2 * rows * 1280 * 1280
    assert proj.moved == 2 * (3 * rows * 1280 + 1280 * 1280 + 1280)


class FakeEvent:
    now = 0.0

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, stop):
        return stop.at - self.at


def test_alternatives_are_timed_in_turn_on_rotating_inputs():
    seen = []

    def call(name, index, milliseconds):
        def run():
            seen.append((name, index))
            FakeEvent.now += milliseconds

        return run

    calls = {"x": [call("x", i, 2) for i in range(3)], "y": [call("y", i, 5) for i in range(2)]}
    timings = time_in_turn(
        calls, seconds=0, warmup=1, least=4, event=FakeEvent, synchronize=lambda: None
    )
    assert (timings["x"].median, timings["y"].median) == pytest.approx((2e-3, 5e-3))
    assert timings["x"].rounds == 4
    assert seen[2:6] == [("x", 0), ("y", 0), ("x", 1), ("y", 1)]


def test_sets_exceed_the_cache():
    assert sets_beyond_cache(10, 100) == 20
    assert sets_beyond_cache(1000, 100) == 2


NAMES = ["qkv", "attention", "proj", "fc1", "fc2", "patch_embed", "norm", "spatial_map"]


@pytest.mark.parametrize("name", [*NAMES, "reassemble"])
def test_a_wrong_op_is_refused_and_a_right_one_is_not(name):
    (case,) = (c for c in cases(MODELS["stellar-b8"], 1, "fp16") if c.name == name)
    inputs = gpu_ops.arguments(case, torch.device("cpu"), 0)
    oracle = getattr(oracles, gpu_ops.op_of(case))
    assert gpu_ops.refusal(case, oracle, inputs) is None

    def wrong(*values, **keywords):
        found = oracle(*values, **keywords)
        gpu_ops.results(found)[0][..., -1] += 0.2
        return found

    reason = gpu_ops.refusal(case, wrong, inputs)
    assert reason is not None and "exceeds its budget" in reason


def test_a_row_that_fails_does_not_end_its_part(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access")

    items = [("a", broken), ("b", lambda: {"x": 1}), ("c", lambda: {"x": 2})]
    monkeypatch.setattr(gpu_parts, "jobs", lambda part: iter(items))
    rows = []
    assert gpu_parts.work("fake", {"c"}, rows.append) == 1
    assert rows == [
        {"begin": "a", "limit": 90.0},
        {"key": "a", "failed": "RuntimeError: CUDA error: an illegal memory access"},
        {"begin": "b", "limit": 90.0},
        {"key": "b", "x": 1},
    ]


def test_a_lost_context_ends_the_process_and_no_row_of_it_counts(monkeypatch):
    items = [("a", lambda: {"x": 1}), ("b", lambda: {"x": 2}), ("c", lambda: {"x": 3})]
    monkeypatch.setattr(gpu_parts, "jobs", lambda part: iter(items))
    rows = []
    status = gpu_parts.work("fake", set(), rows.append, is_lost=lambda: rows[-1]["begin"] == "b")
    assert status == gpu_run.RESTART
    assert rows[1] == {"key": "a", "x": 1}
    assert rows[-1]["key"] == "b" and "context was lost" in rows[-1]["failed"]


def test_every_part_has_rows(monkeypatch):
    monkeypatch.setattr(gpu_parts, "has_fp8", lambda: True)
    for item in gpu.PARTS:
        if item.command[-1] != item.name:
            continue  # a program of its own
        found = list(gpu_parts.jobs(item.name))
        keys = [job.key for job in found]
        assert keys and len(set(keys)) == len(keys)
        assert all(job.limit <= item.seconds for job in found), item.name


def test_the_first_run_holds_what_matters_most():
    runs = {part.name: found for part, found in gpu.schedule(gpu.PARTS, gpu.MOST_MINUTES)}
    for name in ("environment", "ceilings", "tests", "encode", "ops"):
        assert runs[name] == [1], name
    assert runs["compile"] == [2]
    text = "\n".join(gpu.listing(gpu.PARTS, gpu.MOST_MINUTES))
    most = max(max(found) for found in runs.values())
    assert f"all of its time, {most} of them" in text and "--resume" in text
    assert "a first run then holds environment, ceilings, tests, encode, ops\n" in text
    assert [found for _, found in gpu.schedule(gpu.PARTS[:3], 2)] == [[1], [1], [1, 2]]
