"""The one timing loop: fair turns, true statistics, a failure that is its own's alone."""

import itertools

import pytest
import torch
from harness import timing
from harness.timing import Timing, in_turns, on_gpu, rows_of, sets_beyond_cache, turns_of


def test_everyone_has_a_turn_a_round_in_changing_order_and_warming_up_does_not_count():
    seen = []
    turns = {name: (lambda i, name=name: seen.append((i, name)) or float(i)) for name in "abc"}
    taken, not_run = in_turns(turns, least=6, warmup=2)
    assert taken == {name: [0, 1, 2, 3, 4, 5] for name in "abc"} and not not_run
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert [{index for index, _ in found} for found in rounds] == [{i} for i in range(-2, 6)]
    orders = ["".join(name for _, name in found) for found in rounds]
    assert {"".join(sorted(order)) for order in orders} == {"abc"} and len(set(orders)) > 2


@pytest.mark.parametrize(
    ("limits", "rounds"),
    [
        ({"least": 2, "seconds": 0.0}, 2),
        ({"least": 2, "seconds": 5.5}, 6),
        ({"least": 9, "seconds": 5.5}, 9),
        ({"least": 2, "seconds": 99.0, "most": 7}, 7),
    ],
)
def test_rounds_end_by_time_or_number(limits, rounds):
    ran = []
    taken, _ = in_turns({"a": lambda i: ran.append(i) or 0.0}, clock=lambda: len(ran), **limits)
    assert len(taken["a"]) == rounds


def failing(after: int):
    def turn(index: int) -> float:
        if index >= after:
            raise RuntimeError("out of memory\nand a trace")
        return 1.0

    return turn


@pytest.mark.parametrize("after", [-1, 0, 3])
def test_one_that_fails_loses_its_figure_and_nobody_else_does(after):
    turns = {"ours": lambda _: 1.0, "b": failing(after), "c": lambda _: 2.0}
    taken, not_run = in_turns(turns, least=5, warmup=1, must=["ours"])
    assert not_run == {"b": "RuntimeError: out of memory"}
    assert taken == {"ours": [1.0] * 5, "c": [2.0] * 5}


def test_a_failure_of_ours_or_of_the_device_is_an_error():
    with pytest.raises(RuntimeError, match="out of memory"):
        in_turns({"ours": failing(1), "b": lambda _: 1.0}, least=3, must=["ours"])

    def lost() -> None:
        raise InterruptedError("all is lost")

    with pytest.raises(InterruptedError):
        in_turns({"ours": lambda _: 1.0, "b": failing(1)}, least=3, must=["ours"], alive=lost)


def test_the_median_and_quartiles_are_those_of_the_seconds():
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 2.0, 4.0, rounds=5)
    (row,) = rows_of({"x": [1.0, 2.0, 3.0]}, batch=4)
    assert row == {"name": "x", "batch": 4, "median": 2, "low": 1.5, "high": 2.5, "rounds": 3}


def test_inputs_rotate_and_a_device_is_timed_by_its_events(device):
    seen = []

    def call(index: int):
        seen.append(index)
        device.event.now += 4.0

    turn = on_gpu([lambda i=i: call(i) for i in range(3)], repeats=2)
    assert [turn(index) for index in (-1, 0, 1, 2, 3)] == [pytest.approx(2e-3)] * 5
    assert seen == [2, 0, 1, 2, 0]


def test_a_cpu_is_timed_by_its_clock(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks) * 1.0)
    turns = turns_of({"x": [lambda: next(ticks)]}, torch.device("cpu"))
    assert turns["x"](0) == 2.0


def test_sets_exceed_the_cache():
    assert sets_beyond_cache(10, 100) == 20
    assert sets_beyond_cache(1000, 100) == 2
