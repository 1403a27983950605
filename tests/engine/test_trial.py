"""What `auto` tries on a CPU, and what it makes of what it finds."""

import pytest
import torch
from engines import SMALL_META, config_of

import stellar_fast
from stellar_fast.engine import backends, trial
from stellar_fast.engine.backends import choose

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = config_of(SMALL_META)


class Call:
    """Takes what it is said to take, and counts."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self) -> float:
        self.calls += 1
        return self.seconds[min(self.calls - 1, len(self.seconds) - 1)]


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """The clock says what the calls return; nothing is remembered."""
    monkeypatch.setattr(trial, "_seconds", lambda call: call())
    tried = trial.fastest
    tried.cache_clear()
    yield
    tried.cache_clear()


def test_the_best_round_counts():
    noisy = Call(9, 2.5, 9, 1.0, 9)
    assert trial._first({"steady": Call(1.5), "noisy": noisy}) == "noisy"
    assert noisy.calls == 2 + trial.ROUNDS


def test_another_back_end_must_be_clearly_faster():
    for seconds, chosen in ((0.8, "first"), (0.6, "other")):
        calls = {"first": Call(1.0), "other": Call(seconds)}
        assert trial._first(calls, trial.CLEARLY) == chosen


def test_a_hopeless_candidate_is_not_tried_again():
    slow = Call(10.0)
    assert trial._first({"fast": Call(1.0), "slow": slow}) == "fast"
    assert slow.calls == 2


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fp32": 2, "bf16": 1, "openvino": 1, "torch": 1}, ("openvino", "bf16")),
        ({"fp32": 1, "bf16": 2, "openvino": 1, "torch": 1}, ("openvino", "fp32")),
        ({"fp32": 1, "bf16": 2, "openvino": 2, "torch": 1}, ("torch", "fp32")),
    ],
)
def test_precision_by_a_product_back_end_by_a_block(monkeypatch, seconds, expected):
    monkeypatch.setattr(trial, "_product", lambda name, precision, _: Call(seconds[precision]))
    monkeypatch.setattr(trial, "_block", lambda name, precision, _: Call(seconds[name]))
    monkeypatch.setattr(backends, "has_openvino", lambda: True)
    assert choose("auto", "auto", CPU, CONFIG) == expected
    monkeypatch.setattr(trial, "_product", None)  # once a process: it is not tried again
    assert choose("auto", "auto", CPU, CONFIG) == expected


def test_nothing_is_tried_where_nothing_is_open(monkeypatch):
    monkeypatch.setattr(trial, "fastest", None)
    assert choose("torch", "bf16", CPU, CONFIG) == ("torch", "bf16")
    assert choose("auto", "fp16", CPU, CONFIG) == ("torch", "fp16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose("auto", "auto", GPU, CONFIG)[1] == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose("auto", "auto", GPU, CONFIG) == ("torch", "fp32")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        choose("auto", "int4", CPU, CONFIG)
    monkeypatch.setattr(backends, "has_openvino", lambda: False)
    assert choose("auto", "fp32", CPU, CONFIG) == ("torch", "fp32")


@pytest.mark.parametrize("make", [trial._product, trial._block])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_every_candidate_runs(make, name, precision):
    if name == "openvino" and not backends.has_openvino():
        pytest.skip("OpenVINO is not installed (extra cpu)")
    call = make(name, precision, (CONFIG.backbone, CONFIG.sequence_length))
    with torch.inference_mode():
        call()


def test_an_engine_says_what_was_taken(monkeypatch):
    monkeypatch.setattr(trial, "fastest", lambda *_: ("torch", "fp32"))
    monkeypatch.setattr(backends, "has_openvino", lambda: True)
    engine = stellar_fast.load("stellar-b8", weights="synthetic", device="cpu")
    assert (engine.backend, engine.precision) == ("torch", "fp32")
