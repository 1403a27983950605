"""Tables at the end of `pytest benchmarks/`, whatever it captures."""

import harness
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-slower",
        action="store_true",
        help="fail where the engine got slower than the stored result of the same processor",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in harness.SUMMARY:
        terminalreporter.write_line(line)
