"""A first run on a GPU, rehearsed: the stages and the file as they are, on a clock of their own.

Nothing is waited for: a process, and a row in it, only set the clock forward by what they take on a
machine whose Triton cache is empty, and are ended where the command would end them.
"""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
from gpu import run, stages, worker
from harness.results import COMPILED_BF16, EAGER_FP32, adding_to, lines_of, read
from report import goals

HEADER = {"name": "gpu", "device": "fake", "date": "2026-01-01", "commit": "abc", "sources": "s"}
# Seconds. Those of kernels and tests are what an H200 with 16 cores took (benchmarks/results), a
# row of `encode` is a 12th of that stage's 80 s; what torch.compile takes for H/14 is an estimate.
START = 10.0  # of a process: torch and Triton from a disk that has not read them yet
FIRST = 30.0  # of the command, before its first stage
COMPILED = 272.0 / 75  # a kernel, on one core: 75 of them took 17 s on 16 cores
KERNELS = 75
SMOKE, CEILING, ENCODE, OP, COMPILE, TESTS, OTHER = 50.0, 2.0, 6.7, 1.5, 110.0, 200.0, 6.0
NOT_IN_A_FIRST_RUN = ("kernels without spills", "extraction")  # goals that other commands measure


class Ended(BaseException):
    """Of a process, with its exit status; None where its time was up."""


class Machine:
    """Runs processes of stages as `run.run_stage` starts them; `slower`: all takes that much more.

    Attributes:
        now: seconds since the command was given.
        ran: stages and keys of the rows that were begun.
        kill_in: the row in which the command is killed.
    """

    def __init__(self, slower: float = 1.0, cores: int = 16, durations=None) -> None:
        self.slower, self.cores, self.durations = slower, cores, durations or {}
        self.now, self.ran, self.kill_in, self.is_warm = 0.0, [], None, False

    def seconds(self, stage: str, key: str) -> float:
        kernels = KERNELS * COMPILED / min(self.cores, KERNELS)
        # What is not compiled yet is compiled by the rows that launch it, one after another.
        cold = 0.0 if self.is_warm else KERNELS * COMPILED / 12
        usual = {"environment": 1.0, "warm": kernels, "smoke": SMOKE + 2 * cold, "tests": TESTS,
                 "ceilings": CEILING, "encode": ENCODE + cold, "ops": OP, "compile": COMPILE,
                 "compilers": COMPILE}  # fmt: skip
        if stage == "ops" and key.endswith("/compile"):
            return self.slower * 15.0
        return self.slower * self.durations.get(stage, usual.get(stage, OTHER))

    def process(self, stage, path, file, seconds, only):
        """As `run._process`."""
        end = self.now + seconds

        def passes(taken: float) -> None:
            if self.now + taken > end:
                self.now = end
                raise Ended(None)
            self.now += taken

        def measure(job: worker.Job) -> list[dict]:
            self.ran.append((stage.name, job.key))
            if self.kill_in == self.ran[-1]:
                raise KeyboardInterrupt
            taken = self.seconds(stage.name, job.key)
            passes(min(taken, job.limit))
            if taken > job.limit:
                raise Ended(run.HUNG)
            self.is_warm |= stage.name == "warm"
            return rows_of(stage.name, job.key)

        try:
            passes(START * self.slower)
            jobs = (job._replace(run=partial(measure, job)) for job in stages.jobs(stage.name))
            write = lambda line: file.write(lines_of([line]))  # noqa: E731
            return worker.work(stage.name, jobs, lambda: False, read(path), write)
        except Ended as status:
            return status.args[0]


def rows_of(stage: str, key: str) -> list[dict]:
    """What a job gives on a machine where nothing fails."""
    if stage not in ("encode", "compile", "compilers"):
        return [{"name": stage, "rate": 1e12, "summary": "9 passed"}]
    model, batch, precision = key.split("/")
    common = {"model": model, "batch": int(batch[1:]), "precision": precision}
    compiled = precision == "compile"
    names = ["engine bf16", "engine fp8", COMPILED_BF16] if compiled else []
    names = names or [f"engine {precision}", EAGER_FP32]
    figures = {"median": 1.0, "images_per_second": 1.0, "flops": 1e12, "bytes": 1e9}
    figures |= {"low": 1.0, "high": 1.0, "latency_median": 1.0, "latency_p99": 1.0}
    return [{"name": name, **common, **figures} for name in names]


@pytest.fixture
def give(tmp_path, monkeypatch):
    """Gives the command once on a machine, by default with the stages as they are."""
    monkeypatch.setattr(stages, "has_fp8", lambda: True)
    quiet = SimpleNamespace(dump_traceback_later=lambda *_, **__: None,
                            cancel_dump_traceback_later=lambda: None)  # fmt: skip
    monkeypatch.setattr(worker, "faulthandler", quiet)

    def once(machine: Machine, order=run.STAGES, path=tmp_path / "r.jsonl"):
        machine.now = FIRST * machine.slower
        monkeypatch.setattr(run, "_process", machine.process)
        monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: machine.now))
        with adding_to(path, HEADER) as file:
            run.run(order, path, file, run.MOST_MINUTES - machine.now / 60)
        assert machine.now <= 60 * run.MOST_MINUTES + 1, "a run outlasts its minutes"
        return read(path)

    return once


def missing(result) -> list[str]:
    """Goals of a GPU without a figure, and "counts" where no figure counts."""
    lines = list(itertools.islice(goals.lines(result, None), len(goals.GPU_GOALS)))
    found = [text for text, _, _, share, _ in lines if not share]
    counts = {met for *_, met in lines if met} <= {"yes", "no"}
    return [t for t in found if not t.startswith(NOT_IN_A_FIRST_RUN)] + ["counts"] * (not counts)


@pytest.mark.parametrize(
    "machine",
    [{}, {"slower": 1.4}, {"cores": 4}, {"durations": {"compile": 200.0}}],
    ids=["as measured", "slower", "few cores", "a slow compiler"],
)
def test_a_first_run_of_nine_minutes_gives_every_goal_a_figure(give, machine):
    result = give(Machine(**machine))
    assert missing(result) == []
    for model in ("stellar-h16", "stellar-b16", "stellar-l16"):
        for precision in ("bf16", "fp8"):
            assert "median" in goals.encoded(result, model, 64, precision)
    assert result.has("compile", "stellar-h16/b64/compile")


def moved(name: str, to: int) -> list[run.Stage]:
    """The stages with one of them in another place."""
    others = [stage for stage in run.STAGES if stage.name != name]
    (one,) = (stage for stage in run.STAGES if stage.name == name)
    return [*others[:to], one, *others[to:]]


def limited(name: str, seconds: float) -> list[run.Stage]:
    return [run.Stage(s.name, seconds) if s.name == name else s for s in run.STAGES]


@pytest.mark.parametrize(
    "order",
    [
        moved("compile", 13), moved("tune", 1), moved("tests", 1), moved("ceilings", 13),
        moved("smoke", 13), moved("warm", 13), limited("warm", 20), limited("smoke", 40),
        limited("encode", 60), limited("compile", 90),
    ],
    ids=[
        "compiler last", "tuning first", "tests first", "ceilings last", "smoke last", "cold",
        "little to compile in", "little for tests", "little for engines", "little for the compiler",
    ],
)  # fmt: skip
def test_another_order_or_other_limits_would_leave_goals_without_one(give, order):
    assert missing(give(Machine(), order)) != []


def test_the_same_command_goes_on_until_nothing_is_left(give):
    seen: set = set()
    for _ in range(30):
        machine = Machine()
        result = give(machine)
        assert not seen & set(machine.ran), "what has a figure is not repeated"
        seen |= {job for job in machine.ran if result.has(*job)}
        if len(result.finished) == len(run.STAGES):
            return
    pytest.fail("never done")


def test_a_kill_in_any_row_of_a_first_run_loses_that_row_alone(give, tmp_path):
    whole = Machine()
    result = give(whole, path=tmp_path / "whole.jsonl")
    kept = [job for job in whole.ran if result.has(*job)]  # the others were cut off
    assert len(kept) > 40
    for index, row in enumerate(kept):
        path = tmp_path / f"{index}.jsonl"
        first, second = Machine(), Machine()
        first.kill_in = row
        with pytest.raises(KeyboardInterrupt):
            give(first, path=path)
        found = read(path)
        assert [job for job in kept[: index + 1] if not found.has(*job)] == [row]
        give(second, path=path)
        assert row in second.ran and not set(second.ran) & set(kept[:index])
