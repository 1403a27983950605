"""Parts of the GPU command that crash, hang or fail: the rest goes on, and the file says so."""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import gpu
import gpu_run
import harness
import pytest

FACTS = {"commit": "abc", "device": "fake", "date": "2026-01-01", "time": "00:00:00"}
# What stands for `gpu_parts.work`: `fate` is what happens in row b.
CODE = """
import json, os, sys, time
done = set(json.load(sys.stdin))
open({log!r}, "a").write(" start")
status = 0
for key in ("a", "b", "c", "finished"):
    if key in done:
        continue
    if key == "finished":
        if status == 0:
            print(json.dumps({{"key": key}}), flush=True)
        continue
    print(json.dumps({{"begin": key, "limit": {limit}{outlasted}}}), flush=True)
    open({log!r}, "a").write(" " + key)
    if key == "b":
        {fate}
    print(json.dumps({{"key": key}}), flush=True)
sys.exit(status)
"""
FAILS = 'print(json.dumps({"key": "b", "failed": "x"}), flush=True); '


def fake(tmp_path: Path, fate: str, limit: float = 30, outlasted: str = "") -> gpu.Part:
    text = CODE.format(log=str(tmp_path / "log"), limit=limit, outlasted=outlasted, fate=fate)
    return gpu.Part("fake", 60, (sys.executable, "-c", text))


def rows(results: gpu.Results) -> dict[str, dict]:
    found = json.loads(results.path.read_text())["rows"]
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row for row in found}


def log(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text().strip()


@pytest.mark.parametrize(
    ("fate", "why"),
    [
        (FAILS + f"sys.exit({gpu_run.RESTART})", "x"),
        ("os.kill(os.getpid(), 11)", "died in this row, exit status -11"),
        ("time.sleep(60)", "no result within 1 s"),
    ],
    ids=["sticky error", "crash", "hang"],
)
def test_the_process_is_restarted_behind_the_row_that_killed_it(tmp_path, fate, why):
    results = gpu.Results(tmp_path / "r.json", FACTS)
    start = time.monotonic()
    limit = 1 if "sleep" in fate else 30
    assert not gpu.run_part(fake(tmp_path, fate, limit), results, 50)
    assert time.monotonic() - start < 20
    assert log(tmp_path) == "start a b start c"
    found = rows(results)
    assert list(found) == ["a", "b", "c", "part"], "no last row: b must be tried again"
    assert why in found["b"]["failed"] and "b" in found["part"]["failed"]

    (tmp_path / "log").unlink()
    assert gpu.run_part(fake(tmp_path, "pass"), gpu.Results(results.path, FACTS), 50)
    assert log(tmp_path) == "start b"
    assert sorted(rows(results)) == ["a", "b", "c", "finished"]


def test_a_row_that_may_outlast_its_limit_says_what_it_has_and_is_not_repeated(tmp_path):
    results = gpu.Results(tmp_path / "r.json", FACTS)
    outlasted = ', "outlasted": {"not_run": {"compile": "did not finish"}}'
    part = fake(tmp_path, "time.sleep(60)", 1, outlasted)
    assert gpu.run_part(part, results, 50)
    assert rows(results)["b"] == {
        "part": "fake", "key": "b", "not_run": {"compile": "did not finish"},
    }  # fmt: skip
    assert list(rows(results)) == ["a", "b", "c", "finished"]


def test_restarts_are_bounded(tmp_path):
    text = (
        "import json, sys, os\ndone = set(json.load(sys.stdin))\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n"
        "key = next(k for k in map(str, range(99)) if k not in done)\n"
        "print(json.dumps({'begin': key, 'limit': 9}), flush=True)\nos.abort()\n"
    )
    results = gpu.Results(tmp_path / "r.json", FACTS)
    part = gpu.Part("fake", 60, (sys.executable, "-c", text))
    assert not gpu.run_part(part, results, 50)
    assert len(log(tmp_path)) == 1 + gpu_run.MOST_RESTARTS
    assert "given up after" in rows(results)["part"]["failed"]


def test_a_plain_failed_row_is_repeated_by_the_next_run_only(tmp_path):
    results = gpu.Results(tmp_path / "r.json", FACTS)
    assert not gpu.run_part(fake(tmp_path, FAILS + "status = 1; continue"), results, 50)
    assert log(tmp_path) == "start a b c"
    assert list(rows(results)) == ["a", "b", "c", "part"]


def test_nothing_that_a_part_started_outlives_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    popen = f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL)"
    fate = f"import subprocess; {popen}; os.abort()"
    gpu.run_part(fake(tmp_path, fate), gpu.Results(tmp_path / "r.json", FACTS), 50)
    time.sleep(3.5)
    assert not mark.exists()


def test_rows_get_their_floor_from_the_ceilings_of_the_file(tmp_path):
    results = gpu.Results(tmp_path / "r.json", FACTS)
    row = {"key": "k", "flops": 2e12, "bytes": 1e9, "precision": "fp8"}
    results.add("encode", {**row, "engine": {"median": 0.004}})
    assert "floor" not in results.content["rows"][0]
    for key, value in (("bf16", {"tflops": 800}), ("fp8", {"tflops": 1000})):
        results.add("ceilings", {"key": key, **value})
    results.add("ceilings", {"key": "copy", "gb_per_second": 4000})
    results.add("encode", {**row, "engine": {"median": 0.004}})
    found = results.content["rows"][-1]
    assert (found["floor"], found["bound"]) == (pytest.approx(0.002), "flops")
    assert found["of_floor"] == pytest.approx(0.5) == found["of_ceiling"]
    results.add("ops", {**row, "ours": "kernel", "kernel": {"median": 0.008}, "bytes": 16e9})
    found = results.content["rows"][-1]
    assert (found["bound"], found["of_floor"]) == ("bytes", pytest.approx(0.5))
    assert found["of_ceiling"] == pytest.approx(0.25)
    results.add("ops", {**row, "refused": "wrong"})
    assert "floor" not in results.content["rows"][-1]


@pytest.fixture
def options(tmp_path, monkeypatch) -> argparse.Namespace:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    return argparse.Namespace(out=None, resume=None, fresh=False, commit=None)


def at(monkeypatch, moment: str) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return cls.fromisoformat(moment).replace(tzinfo=zone)

    monkeypatch.setattr(gpu.datetime, "datetime", Clock)


def test_a_run_goes_on_past_midnight_by_itself(tmp_path, options, monkeypatch):
    at(monkeypatch, "2026-11-23T23:59:00")
    first = gpu.open_results(options, "NVIDIA H200")
    first.add("encode", {"key": "k"})
    assert first.path == tmp_path / "results" / "nvidia-h200" / "2026-11-23-abc.json"
    at(monkeypatch, "2026-11-24T00:01:00")
    second = gpu.open_results(options, "NVIDIA H200")
    assert second.path == first.path and second.finished("encode") == {"k"}
    assert [run["date"] for run in second.content["runs"]] == ["2026-11-23", "2026-11-24"]
    second.add("encode", {"key": "l"})

    options.out = tmp_path / "out"  # as where only some folder comes back
    third = gpu.open_results(options, "NVIDIA H200")
    assert third.path == tmp_path / "out" / "nvidia-h200" / first.path.name
    assert third.finished("encode") == {"k", "l"}


def test_other_code_other_devices_and_fresh_runs_start_anew(tmp_path, options, monkeypatch):
    first = gpu.open_results(options, "NVIDIA H200")
    first.add("encode", {"key": "k"})
    assert gpu.open_results(options, "NVIDIA A100").finished("encode") == set()
    monkeypatch.setattr(gpu, "commit", lambda: "def")
    assert gpu.open_results(options, "NVIDIA H200").finished("encode") == set()
    for commit, fresh in (("abc", True), ("abc-dirty", False), ("abc-dirty", False)):
        options.commit, options.fresh = commit, fresh
        other = gpu.open_results(options, "NVIDIA H200")
        assert not other.path.exists() and other.finished("encode") == set()
        other.add("encode", {"key": "k"})
    options.commit, options.fresh, options.resume = "def", False, first.path
    with pytest.raises(ValueError, match="was measured at commit"):
        gpu.open_results(options, "NVIDIA H200")


def test_without_git_the_commit_must_be_given(tmp_path, options, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="give --commit"):
        gpu.open_results(options, "NVIDIA H200")
    options.commit = "abc"
    assert gpu.open_results(options, "NVIDIA H200").content["commit"] == "abc"
