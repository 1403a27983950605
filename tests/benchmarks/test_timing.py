"""The benchmark harness: fair turns, true statistics, no figure for a wrong result."""

import json
from importlib import metadata

import harness
import pytest
import torch


def test_functions_take_turns():
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    alternation = harness.Alternation(functions, warmup=1)
    assert calls == ["a", "b", "c"]
    for _ in range(3):
        alternation.round()
    assert calls == list("abc") * 4
    timings = alternation.timings()
    assert {timing.rounds for timing in timings.values()} == {3}


def test_the_median_and_quartiles_are_those_of_the_seconds():
    timing = harness.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing == harness.Timing(median=3.0, low=2.0, high=4.0, rounds=5)
    assert harness.row(timing, 6, name="x")["images_per_second"] == 2.0


def test_a_wrong_result_gets_no_figure():
    exact = {"dense": torch.linspace(-1, 1, 99, dtype=torch.float64)}
    plain = {"dense": exact["dense"].bfloat16()}
    harness.within_budget(plain, plain, exact)
    wrong = {"dense": plain["dense"].clone()}
    wrong["dense"][7] += 0.1
    with pytest.raises(AssertionError, match=r"dense: error .* exceeds its budget"):
        harness.within_budget(wrong, plain, exact)
    wrong["dense"][7] = float("nan")
    with pytest.raises(AssertionError, match="exceeds its budget"):
        harness.within_budget(wrong, plain, exact)


def test_a_missing_output_gets_no_figure():
    exact = {"dense": torch.ones(3, dtype=torch.float64), "cls": torch.ones(1)}
    with pytest.raises(AssertionError, match="cls"):
        harness.within_budget({"dense": exact["dense"]}, exact, exact)


def test_a_result_file_says_what_was_measured_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.write_result("cpu", "encode", [{"name": "x"}], processor=harness.processor())
    result = json.loads(path.read_text())
    assert path.parent == tmp_path / "cpu"
    assert {"date", "commit", "versions", "processor", "rows", "name"} <= set(result)
    assert result["versions"]["torch"] == metadata.version("torch")
    assert result["processor"]["threads"] == torch.get_num_threads()
