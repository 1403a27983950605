"""What a session of `pytest benchmarks/` keeps, and when."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from harness import results
from harness.results import ROOT, read


@pytest.fixture
def suite(folder):
    """The conftest of the benchmarks, as a session of its own has it."""
    spec = importlib.util.spec_from_file_location("suite", ROOT / "benchmarks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["suite"]


def rows(*keys: str, speedup: float = 2.0) -> list[dict]:
    times = {"engine": 1 / speedup, "eager": 1.0}
    return [
        {"stage": "ops", "key": key, "name": name, "median": s, "low": s, "high": s, "rounds": 3}
        for key in keys
        for name, s in times.items()
    ]


def finish(suite, status: pytest.ExitCode, found: list[dict], fail_slower: bool = False):
    """Ends a session that was to measure a and b; its exit status and what it printed."""
    suite.RECORDS["ops"] = suite.Record({("ops", "a"), ("ops", "b")}, rows=found)
    suite.SUMMARY.clear()
    config = SimpleNamespace(
        getoption=lambda name: fail_slower,
        invocation_params=SimpleNamespace(args=("benchmarks/",)),
    )
    session = SimpleNamespace(config=config, exitstatus=status)
    suite.pytest_sessionfinish(session, status)
    return session.exitstatus, "\n".join(suite.SUMMARY)


@pytest.mark.parametrize("status", [pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR])
def test_an_interrupted_session_leaves_nothing(suite, folder, status):
    assert finish(suite, status, rows("a", "b")) == (status, "")
    assert not list(folder.iterdir())


def test_a_part_of_a_benchmark_is_printed_and_not_stored(suite, folder):
    _, said = finish(suite, pytest.ExitCode.OK, rows("a"))
    assert "a part of the benchmark: not stored" in said and not list(folder.iterdir())


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="the file is the GPU's")
def test_a_whole_session_is_stored_and_a_slower_engine_may_be_a_failure(suite, folder, monkeypatch):
    _, said = finish(suite, pytest.ExitCode.TESTS_FAILED, rows("a", "b"))
    (path,) = folder.rglob("*.jsonl")
    found = read(path)
    assert path.name in said and set(found.jobs) == {("ops", "a"), ("ops", "b")}
    assert found.facts["command"] == "pytest benchmarks/" and found.facts["processor"]
    monkeypatch.setattr(suite.compare, "stored", lambda new: found)
    slow = rows("a", "b", speedup=1.0)
    assert finish(suite, pytest.ExitCode.OK, slow)[0] == pytest.ExitCode.OK
    status, said = finish(suite, pytest.ExitCode.OK, slow, fail_slower=True)
    assert status == pytest.ExitCode.TESTS_FAILED and said.count("SLOWER") == 2


def test_a_gpus_ops_join_the_one_file_of_its_device(suite, folder, monkeypatch):
    monkeypatch.setattr(suite, "DEVICE", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(suite.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    header = results.facts("gpu", "gpu/run.py", device="NVIDIA H200")
    path = results.going_on(folder / "nvidia-h200", header)
    with results.adding_to(path, header) as file:
        file.write(results.lines_of([[{"stage": "ceilings", "key": "bf16", "rate": 1.0}]]))
    finish(suite, pytest.ExitCode.OK, rows("a", "b"))
    assert [found.name for found in folder.rglob("*.jsonl")] == [path.name]
    assert set(read(path).jobs) == {("ceilings", "bf16"), ("ops", "a"), ("ops", "b")}
    assert len(read(path).runs) == 2
