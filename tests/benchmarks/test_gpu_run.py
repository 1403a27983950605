"""Stages of the GPU command that crash, hang or fail: the rest goes on, and the file says so."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import run, stages, worker
from harness import results
from harness.results import ROOT, adding_to, read

HEADER = {"name": "gpu", "device": "fake", "date": "2026-01-01", "commit": "abc", "sources": "s"}
# A stage's program as it is, with jobs of its own: `fate` is what happens in job b.
CODE = """
import os, sys, time
sys.path.append({benchmarks!r})
from gpu import worker

gone = []

def job(key):
    def measure():
        with open({log!r}, "a") as file:
            file.write(" " + key)
        if key == "b":
            {fate}
        return [{{"name": "kernel", "median": 1.0}}]
    return worker.Job(key, measure, {limit} if key == "b" else 300, {outlasted})

sys.exit(worker.main(lambda stage: map(job, "abc"), lambda: bool(gone)))
"""
FAKE = run.Stage("fake", 60)
GENEROUS = 300.0  # seconds, where nothing but an end is waited for


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs the stage with a fate of job b: why it did not finish, and the file."""
    path = tmp_path / "r.jsonl"

    def go(fate: str = "pass", limit: float = GENEROUS, outlasted=None, seconds=GENEROUS, only=""):
        program = tmp_path / "program.py"
        facts = {"log": str(tmp_path / "log"), "benchmarks": str(ROOT / "benchmarks")}
        program.write_text(CODE.format(fate=fate, limit=limit, outlasted=outlasted, **facts))
        monkeypatch.setattr(run, "COMMAND", (sys.executable, "-P", str(program)))
        (tmp_path / "log").write_text("")
        with adding_to(path, HEADER) as file:
            why = run.run_stage(FAKE, path, file, seconds, only)
        return why, read(path), (tmp_path / "log").read_text().split()

    return go


def test_only_the_rows_that_are_asked_for_run_and_the_stage_is_not_finished(stage):
    reason, found, ran = stage(only="^[bc]$")
    assert (reason, ran) == ("", ["b", "c"]) and not found.finished


LOST = "gone.append(1); raise RuntimeError('CUDA error: an illegal access')"


@pytest.mark.parametrize(
    ("fate", "limit", "why"),
    [
        ("raise ValueError('of its own')", GENEROUS, "ValueError: of its own"),
        (LOST, GENEROUS, "RuntimeError: CUDA error: an illegal access"),
        ("gone.append(1)", GENEROUS, "the device was lost in this row"),
        ("os.kill(os.getpid(), 11)", GENEROUS, "died in this row, exit status -11"),
        ("time.sleep(3600)", 5, "no result within 5 s"),
    ],
    ids=["error", "sticky error", "silent loss", "crash", "hang"],
)
def test_a_row_costs_only_itself_and_the_next_run_repeats_it(stage, fate, limit, why):
    reason, found, ran = stage(fate, limit)
    assert ran == ["a", "b", "c"] and reason == "no figure for b"
    assert why in found.jobs["fake", "b"][0]["failed"]
    assert found.has("fake", "a") and found.has("fake", "c") and not found.finished

    reason, found, ran = stage()
    assert (reason, ran) == ("", ["b"]) and found.finished == {"fake"}
    assert [rows[0]["median"] for rows in found.jobs.values()] == [1.0] * 3
    assert stage("os.abort()")[::2] == ("", []), "nothing is left to do"


def test_a_row_that_may_outlast_its_limit_says_what_it_has_and_is_not_repeated(stage):
    late = {"name": "compiler", "not_run": "did not finish"}
    reason, found, ran = stage("time.sleep(3600)", 5, late)
    assert (reason, ran) == ("", ["a", "b", "c"]) and found.finished == {"fake"}
    assert found.jobs["fake", "b"] == [{"stage": "fake", "key": "b", **late}]


def test_a_stage_is_cut_off_in_time_and_goes_on_without_repeats(stage, tmp_path, monkeypatch):
    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:  # time is up in the middle of b
                until(lambda: "b" in (tmp_path / "log").read_text())
                raise subprocess.TimeoutExpired("", timeout)
            return super().wait()

    with monkeypatch.context() as patch:
        patch.setattr(run.subprocess, "Popen", Popen)
        reason, found, ran = stage("time.sleep(3600)", seconds=9)
    assert reason == "cut off after 9 s" and ran == ["a", "b"]
    assert "cut off" in found.jobs["fake", "b"][0]["failed"]
    assert stage()[::2] == ("", ["b", "c"])


def test_restarts_are_bounded_and_a_stage_that_cannot_begin_is_not_restarted(stage, monkeypatch):
    monkeypatch.setattr(run, "MOST_RESTARTS", 1)
    code = CODE.replace('key == "b"', "True")
    monkeypatch.setattr(sys.modules[__name__], "CODE", code)
    reason, _, ran = stage("os.abort()")
    assert reason == "given up after 1 restarts" and ran == ["a", "b"]
    monkeypatch.setattr(sys.modules[__name__], "CODE", "raise SystemExit(9)")
    assert stage()[::2] == ("exit status 9", [])


def alive(pid: int) -> bool:
    """Whether a process is there; one that ended and waits to be collected is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition) -> None:
    end = time.monotonic() + GENEROUS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


STARTS = "p = subprocess.Popen(['sleep', '3600']); open({!r}, 'w').write(str(p.pid))"


def test_nothing_that_a_stage_started_outlives_it(stage, tmp_path):
    fate = f"import subprocess; {STARTS.format(str(tmp_path / 'pid'))}; os.abort()"
    stage(fate)
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_killed_command_leaves_a_true_file_and_no_process(stage, tmp_path):
    stage("os.abort()")  # writes the program
    program, path, pid = tmp_path / "program.py", tmp_path / "k.jsonl", tmp_path / "pid"
    fate = f"import subprocess; {STARTS.format(str(pid))}; time.sleep(3600)"
    program.write_text(program.read_text().replace("os.abort()", fate))
    driver = (
        f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r})\n"
        "from pathlib import Path\nfrom gpu import run\nfrom harness.results import adding_to\n"
        f"run.COMMAND = {run.COMMAND!r}\npath = Path({str(path)!r})\n"
        f"with adding_to(path, {HEADER!r}) as file:\n"
        "    run.run_stage(run.Stage('fake', 600), path, file, 600)\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", driver])
    until(lambda: pid.exists() and pid.read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not alive(int(pid.read_text())))
    found = read(path)
    assert found.has("fake", "a") and not found.has("fake", "b")

    def free() -> bool:
        with contextlib.suppress(BlockingIOError), adding_to(path, HEADER):
            return True
        return False

    until(free)


def test_a_stage_that_fails_does_not_end_the_command(tmp_path, monkeypatch, capsys):
    reasons = {"one": "exit status 9", "two": ""}
    monkeypatch.setattr(run, "run_stage", lambda stage, *_: reasons[stage.name])
    both = [run.Stage("one", 9), run.Stage("two", 9)]
    assert not run.run(both, tmp_path, None, 1)
    assert capsys.readouterr().out == "one: not finished: exit status 9\ntwo: finished\n"
    assert run.run(both[1:], tmp_path, None, 1)
    assert not run.run(both, tmp_path, None, 0.01), "no time left"


def test_a_dry_run_lists_stages_and_the_first_run_holds_what_matters_most(capsys):
    assert run.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    for item in run.STAGES:
        assert f"{item.name:12} at most {item.seconds:4.0f} s" in text
    runs = {stage.name: found for stage, found in run.schedule(run.STAGES, run.MOST_MINUTES)}
    most = max(max(found) for found in runs.values())
    assert f"all of its time, {most} of them" in text and "--resume" in text
    assert "a first run then holds environment, warm, smoke, ceilings, encode\n" in text
    assert [found for _, found in run.schedule(run.STAGES[:3], 2)] == [[1], [1, 2], [2, 3]]
    with pytest.raises(SystemExit):
        run.main(["--minutes", "10", "--dry-run"])


def test_without_a_device_there_is_one_error(monkeypatch, capsys):
    monkeypatch.setattr(run, "device_name", lambda: None)
    assert run.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_writes_where_it_is_told_and_knows_its_file_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "device_name", lambda: "NVIDIA H200")
    seen = []

    def measure(stages, path, file, *_) -> bool:
        seen.append((path, stages))
        file.write(results.lines_of([{"finished": stages[len(seen) - 1].name}]))
        return True

    monkeypatch.setattr(run, "run", measure)
    out = folder / "out"
    for todo, left in (("ops, tune", "tune"), ("tune", "nothing")):
        assert run.main(["--out", str(out), "--commit", "abc", "--stages", "ops", "tune"]) == 0
        assert capsys.readouterr().out.endswith(f"to do: {todo}\nleft: {left}\n")
    (path, chosen), second = seen
    assert second[0] == path and [stage.name for stage in chosen] == ["ops", "tune"]
    assert path.parent == out / "nvidia-h200" and len(read(path).runs) == 2
    assert read(path).facts["commit"] == "abc" and read(path).facts["sources"]
    assert run.main(["--resume", str(folder / "none.jsonl")]) == 1


def test_processes_can_import_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir("/")
    probe = (
        "import stellar_fast, stellar_fast.config, importlib.util as u;"
        "print(stellar_fast.__file__, u.find_spec('stellar_fast.reference').origin,"
        "u.find_spec('stellar_fast.kernels').origin)"
    )
    with run.importable():
        folder = os.environ["PYTHONPATH"]
        # -S: no site-packages, where the package may be installed.
        done = subprocess.run(
            [sys.executable, "-P", "-S", "-c", probe], capture_output=True, text=True, check=True
        )
    assert all(name.startswith(folder) for name in done.stdout.split()) and done.stdout
    assert not Path(folder).exists()


def test_every_stage_has_rows_within_its_bounds(monkeypatch):
    monkeypatch.setattr(stages, "has_fp8", lambda: True)
    for item in run.STAGES:
        jobs = list(stages.jobs(item.name))
        keys = [job.key for job in jobs]
        assert keys and len(set(keys)) == len(keys)
        assert all(job.limit <= item.seconds for job in jobs), item.name


def test_the_test_stages_name_files_with_their_mark(monkeypatch):
    monkeypatch.setattr(stages, "has_fp8", lambda: True)
    monkeypatch.setattr(stages, "command", lambda arguments: [{"arguments": arguments}])
    for name, mark in (("tests", "gpu"), ("kernels", "kernels")):
        (job,) = stages.jobs(name)
        files = [path for path in job.run()[0]["arguments"] if path.endswith(".py")]
        assert files and all(f"mark.{mark}" in (ROOT / path).read_text() for path in files)


def test_a_command_says_how_it_ended():
    (row,) = stages.command(["-c", "print('FAILED x'); print('1 failed'); raise SystemExit(1)"])
    assert (row["summary"], row["exit"], row["failed"]) == ("1 failed", 1, "FAILED x")
    assert "failed" not in stages.command(["-c", "print('1 passed')"])[0]


def test_rows_of_a_stage_get_their_floor(tmp_path):
    own = {"name": "kernel", "precision": "bf16", "flops": 8.0, "bytes": 1.0, "median": 4.0}
    earlier = results.Result(tmp_path)
    for line in (HEADER, [{"stage": "ceilings", "key": "bf16", "rate": 4.0}],
                 [{"stage": "ceilings", "key": "copy", "rate": 1.0}]):  # fmt: skip
        earlier.take(line)
    lines = []
    jobs = [worker.Job("k", lambda: [own])]
    assert worker.work("ops", jobs, lambda: False, earlier, lines.append) == 0
    assert lines[0] == {"begin": "k", "stage": "ops", "limit": 90.0}
    (row,) = lines[1]
    assert (row["floor"], row["of_floor"], row["key"]) == (2.0, 0.5, "k")
