"""`pytest benchmarks/`: races, their progress, and what is kept of a session.

A session that ran a whole benchmark writes its result file when it ends; one that was interrupted
writes nothing, and one of a part of it (`-k`, one file) is compared and printed only. Races run in
the test itself; then pytest-benchmark times ours alone, for its own table.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import compare
import pytest
import torch
from harness import ceilings, floors, results
from harness.results import Row
from harness.workloads import op_of
from peers import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Say = Callable[[str], None]


@dataclass
class Record:
    """What a session measured of one benchmark.

    Attributes:
        planned: stages and keys of the whole of it.
        facts: of the result file.
    """

    planned: set[tuple[str, str]]
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)

    @property
    def whole(self) -> bool:
        return self.planned <= {(row["stage"], row["key"]) for row in self.rows}


RECORDS: dict[str, Record] = {}
SUMMARY: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-slower",
        action="store_true",
        help="fail where the engine got slower than the stored result of the same machine",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "race" not in metafunc.fixturenames:
        return
    marks = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
    found = [
        pytest.param((case, compiles), id=case.key, marks=marks)
        for case, compiles in ops.points(DEVICE)
        if op_of(case) in metafunc.module.OPS
    ]
    if DEVICE.type == "cpu":
        missing = pytest.mark.skip(reason="the Triton kernels need a CUDA device")
        found.append(pytest.param(None, id="kernels", marks=missing))
    metafunc.parametrize("race", found, indirect=True)


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Prints a line of progress past pytest's capture."""
    plugins = request.config.pluginmanager
    capture, terminal = plugins.getplugin("capturemanager"), plugins.getplugin("terminalreporter")

    def line(text: str) -> None:
        pause = capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
        with pause:
            terminal.ensure_newline()
            terminal.write_line(text)

    return line


@pytest.fixture(scope="session")
def record_of() -> Callable[..., Record]:
    """The record of a benchmark: its name, what the whole of it is, and facts of its file."""
    return lambda name, planned, **facts: RECORDS.setdefault(name, Record(planned, facts))


@pytest.fixture(scope="session")
def op_record(say: Say, record_of: Callable[..., Record]) -> Record:
    """The rows of all op files, ceilings first."""
    record = record_of("ops", {("ops", case.key) for case, _ in ops.points(DEVICE)})
    for key in (*ops.precisions_of(DEVICE), "copy"):
        row = ceilings.measure(key, DEVICE)
        record.rows.append(row)
        unit = "GB/s" if key == "copy" else "GFLOP/s"
        say(f"ceiling of this run: {key} {row['rate'] / 1e9:.1f} {unit}")
    return record


@pytest.fixture
def race(benchmark, op_record: Record, say: Say, request: pytest.FixtureRequest) -> Callable:
    """Runs one op against its rivals and records the rows; fails where ours is wrong."""

    def run() -> None:
        case, compiles = request.param
        match = ops.Race(case, DEVICE, compiles).run()
        known = floors.rates(op_record.rows)
        rows = [floors.with_floor(row, known) for row in match.rows()]
        op_record.rows += rows
        for line in ops.report(rows):
            say(line)
        assert match.refused is None
        benchmark.pedantic(match.once, rounds=3, iterations=1)
        benchmark.extra_info["rows"] = rows

    return run


def _stored(name: str, record: Record, header: Row) -> str:
    """Writes what a whole session measured, and says where."""
    if name == "ops" and DEVICE.type == "cuda":
        # Beside what `gpu/run.py` measures, in the one file of this device and these sources.
        path = results.going_on(results.RESULTS / results.folder_of(header["device"]), header)
        with results.adding_to(path, header) as file:
            file.write(results.lines_of(results.jobs_of(record.rows)))
        return path.name
    return results.write("cpu", header, record.rows).name


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    command = " ".join(["pytest", *session.config.invocation_params.args])
    for name, record in RECORDS.items():
        where: dict[str, Any] = {"processor": results.processor()}
        kept_as = name
        if name == "ops" and DEVICE.type == "cuda":
            kept_as, where = "gpu", {"device": torch.cuda.get_device_name()}
        seconds = round(time.perf_counter() - record.begin)
        header = results.facts(kept_as, command, **where, seconds=seconds, **record.facts)
        new = results.Result(results.RESULTS)
        for line in [header, *results.jobs_of(record.rows)]:
            new.take(line)
        lines, slower = compare.report(new)
        place = "a part of the benchmark: not stored"
        if record.whole:
            place = f"-> {_stored(name, record, header)}"
        SUMMARY.extend([f"\n{name}, {seconds} s, {place}", *lines])
        if slower and session.config.getoption("--fail-slower"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in SUMMARY:
        terminalreporter.write_line(line)
