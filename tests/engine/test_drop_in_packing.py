"""What an engine was packed from is what it answers for."""

import copy
import gc
import weakref

import pytest
import torch
from drop_in import X, assert_same, fast
from torch import Tensor

import stellar_fast
from stellar_fast import module
from stellar_fast.module import FastSTELLARModel, _few

pytestmark = pytest.mark.numerical


def test_what_changes_without_a_trace_in_versions_is_seen(model, x):
    """Weights written through `.data`, NumPy or a flat view: autograd does not count these."""
    changes = {
        "data": lambda: model.encoder.layernorm.bias.data.add_(1),
        "flat": lambda: model.dense_proj.weight.data.view(-1).copy_(torch.linspace(-1, 1, 1024)),
        "average": lambda: [
            p.data.mul_(0.9).add_(torch.ones_like(p), alpha=0.1) for p in model.parameters()
        ],
        "prune": lambda: _prune_data(model.encoder.encoder.layer[1].output.dense.weight),
        "prune columns": lambda: model.sparse_proj.weight.data[:, 20:28].zero_(),
        "set": lambda: setattr(model.dense_proj.bias, "data", x.new_ones(32)),
        "temperature": lambda: setattr(model, "spatial_temp", 0.5),
    }
    if x.device.type == "cpu":
        changes["numpy"] = lambda: model.sparse_tokens.detach().numpy().__imul__(2)
    for name, change in changes.items():
        before = fast(model)
        change()
        found = fast(model)
        assert any(not torch.equal(found[key], value) for key, value in before.items()), name
        assert_same(found, fast(copy.deepcopy(model)))


def _prune_data(weight: Tensor) -> None:
    """Sets the smallest quarter to 0."""
    weight.data[weight.abs() < weight.abs().quantile(0.25)] = 0


def test_what_is_compared_lies_in_many_rows_and_columns():
    for rows, columns in ((768, 768), (3072, 768), (1280, 5120), (32, 32), (768, 3 * 16 * 16)):
        weight = torch.zeros(rows, columns)
        _few(weight).fill_(1)
        assert weight.sum() == 64
        for axis, size in ((0, columns), (1, rows)):
            assert (weight.sum(axis) > 0).sum() >= min(size, 64) / 2
    for numbers in (1, 5, 63, 64, 65, 127, 200):
        assert _few(torch.zeros(numbers)).numel() == min(numbers, 64)


def test_one_number_changed_in_place_is_seen(model, device):
    if device == "cpu":
        model.backend = "torch"  # which packs faster than OpenVINO compiles
    for name, parameter in model.named_parameters():
        if ".pooler." in name:
            continue
        fast(model)
        with torch.no_grad():
            parameter.view(-1)[-1] += 3.0
        assert_same(fast(model), fast(copy.deepcopy(model)))


def test_an_unchanged_module_is_packed_once(model, x, monkeypatch):
    packs = []
    own = FastSTELLARModel._pack

    def pack(self, *arguments):
        packs.append(self)
        return own(self, *arguments)

    monkeypatch.setattr(FastSTELLARModel, "_pack", pack)
    for _ in range(3):
        fast(model)
        fast(model, x[:, :, :32])
        model.eval().requires_grad_(False).to(x.device).float()
        model.state_dict()
    assert len(packs) == 3  # `float` may have moved what it found as it was
    fast(model)
    fast(model)
    assert len(packs) == 4


def test_a_further_call_looks_for_nothing_that_it_knows(model, encodes, monkeypatch):
    """Neither the modules, nor which engine suits the machine, which take as long as a small model
    does."""
    model.requires_grad_(False)
    model.encode(X)

    def asked(*arguments):
        raise AssertionError("asked again")

    monkeypatch.setattr(module, "_modules_of", asked)
    monkeypatch.setattr(module.backends, "choose", asked)
    model.encode(X)
    assert encodes == ["encode"] * 2
    model.sparse_tokens.requires_grad_()
    assert model.encode(X)["cls"].requires_grad and len(encodes) == 2


def test_on_a_gpu_values_are_compared_before_the_engine_and_waited_for_after(
    published, monkeypatch
):
    """So that it is never without work; on a device that does nothing at once."""
    model = stellar_fast.load_stellar("tiny", repo_id=published).requires_grad_(False)
    fast(model)
    snapshot, engine = model._packed.engines[module.ENCODER]
    happened = []

    class Event:
        def record(self, stream):
            happened.append(f"compared on {stream}")

        def synchronize(self):
            happened.append("waited")

    for name, fake in {
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device: f"the stream of {device}",
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(snapshot, "device", torch.device("cuda", 1))
    monkeypatch.setattr(snapshot, "_settings", lambda model: snapshot.settings)
    monkeypatch.setattr(engine, "encode", lambda *_, **__: happened.append("encoded") or {})
    as_it_was = ["compared on the stream of cuda:1", "encoded", "waited"]
    found = model._run(module.ENCODER, (X,), lambda engine: engine.encode(X))
    assert found == {} and happened == as_it_was

    happened.clear()
    model.sparse_tokens.data.mul_(2)
    again = []

    def encode(engine):
        again.append(engine)
        return engine.encode(X)

    with torch.no_grad():
        assert model._run(module.ENCODER, (X,), encode)["cls"].shape == (3, 1, 32)
    assert happened == as_it_was  # and then it was packed anew, and that engine asked
    assert again[0] is engine and len(again) == 2 and again[1] is not engine


def test_memory_is_the_parameters_and_the_packed_weights(model):
    """What was packed before goes before it is packed anew, and when the module moves."""
    fast(model)
    engine = weakref.ref(model._packed.engines[next(iter(model._packed.engines))][1])
    model.double()
    gc.collect()
    assert engine() is None and not model._packed.engines
