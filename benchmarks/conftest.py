"""Races of ops and their result file; tables at the end of `pytest benchmarks/`."""

from collections.abc import Callable, Iterator

import compare
import harness
import op_race
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-slower",
        action="store_true",
        help="fail where the engine got slower than the stored result of the same processor",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in harness.SUMMARY:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def op_record(request) -> Iterator[op_race.Record]:
    """The rows of all op files, written once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = op_race.Record(device, op_race.ceilings_of(device))
    yield record
    if not record.rows:
        return
    path = record.write()
    lines, slower = compare.report(path)
    harness.SUMMARY.extend([f"\nops on {record.processor['name']} -> {path.name}"])
    harness.SUMMARY.extend([*op_race.table(record.rows, record.ceilings), *lines])
    if slower and request.config.getoption("--fail-slower"):
        pytest.fail("\n".join(lines))


@pytest.fixture
def race(benchmark, op_record) -> Callable[..., None]:
    """Runs one op against its rivals and records the row; fails where ours is wrong."""

    def run(case, device, compiles) -> None:
        match = op_race.Race(case, device, compiles)
        if match.refused is None:
            benchmark.pedantic(
                match.our_turn, setup=match.others, rounds=op_race.ROUNDS, iterations=1
            )
        row = match.row()
        op_record.add(row)
        benchmark.extra_info["row"] = row
        assert match.refused is None

    return run
