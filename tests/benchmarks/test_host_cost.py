"""What a call costs the host: the work that is done is counted, no clock is read."""

import gc
import json
import sys

import host_cost
import pytest
import torch
from engines import image, small_engine
from torch.utils._python_dispatch import TorchDispatchMode

# Of a replay that gives five outputs: calls of functions, Python's and C's, and torch's operations.
# At commit b48a34f, the first that had graphs, they were 183 and 23, and 58 us on the same CPU.
CALLS_BEFORE, OPERATIONS_BEFORE = 183, 23


class Operations(TorchDispatchMode):
    """What torch is asked for within it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def calls(function) -> int:
    """How many functions `function` calls, and those that they call."""
    count = 0

    def profile(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # which may call anything at any time
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.fixture
def engine():
    return host_cost.with_graphs(small_engine(max_batch=16))


@pytest.mark.parametrize("batch", [1, 11])
def test_a_replay_is_half_the_work_for_the_host_that_it_once_was(engine, batch):
    x = (255 * image(batch, 64, 64)).byte()
    for _ in range(3):  # launched, captured, replayed
        engine.encode(x)
    with Operations() as found:
        engine.encode(x)
    assert found.seen == ["empty", "copy_", *["empty_like"] * 5, "_foreach_copy_"]
    assert len(found.seen) <= OPERATIONS_BEFORE / 2
    assert calls(lambda: engine.encode(x)) <= CALLS_BEFORE / 2


def test_batches_that_change_cost_no_more_once_they_were_there(engine):
    batches = [image(count, 64, 64) for count in (9, 10, 9, 10)]
    for x in batches:
        engine.encode(x)
    with Operations() as found:
        for x in batches:
            engine.encode(x, check_range=False)
    assert len(found.seen) == 4 * 8 and len(engine._graphs) == 1


def test_the_command_says_what_each_costs_and_measures_two_checkouts_in_turns(
    monkeypatch, capsys, tmp_path
):
    def microseconds(call) -> float:
        call()
        return 67.0

    monkeypatch.setattr(host_cost, "microseconds", microseconds)
    assert host_cost.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["encode, five outputs"] == 67.0 and 0.5 < found["launch"] < 6
    assert host_cost.main([]) == 0 and "encode, cls alone" in capsys.readouterr().out

    places = []

    def run(command, env, **_):
        places.append(env["PYTHONPATH"])
        assert torch.__file__ and command[-1] == "--json"
        taken = {"launch": 10.0 if len(places) % 2 else 5.0}
        return host_cost.subprocess.CompletedProcess(command, 0, json.dumps(taken), "")

    (tmp_path / "stellar_fast").mkdir()
    monkeypatch.setattr(host_cost.subprocess, "run", run)
    assert host_cost.main(["--against", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[-3:] == ["5.0", "us", "0.50"]
    assert len(places) == 2 * host_cost.TURNS
