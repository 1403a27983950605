"""Whatever is done to a module between two encodes, the second is of the module as it then is."""

import copy
import pickle
from collections.abc import Callable, Iterable

import pytest
import torch
from checkpoints import filled, images, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stellar_fast.config import BackboneConfig
from stellar_fast.module import FastSTELLARModel

pytestmark = pytest.mark.numerical
TINY = BackboneConfig(32, 2, 2, 64, 16, 32)
X = images(2, 32, 48, 3)
SEEN = 0.1  # relative: far more than float32 is off, and less than any change of weights below


def new_model(seed: int) -> FastSTELLARModel:
    with torch.device("meta"):
        model = FastSTELLARModel(4, do_recon=False, do_clustering=False, vit_config=TINY)
    return filled(model, seed)


MODELS = [new_model(seed) for seed in (1, 2)]


def train(model: FastSTELLARModel) -> FastSTELLARModel:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return model
    model.train()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.zero_grad()
    model.encode(X)["dense"].float().square().mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()
    return model


def load(model: FastSTELLARModel) -> FastSTELLARModel:
    model.load_state_dict(MODELS[1].state_dict())
    return model


def load_in_place_of(model: FastSTELLARModel) -> FastSTELLARModel:
    like = model.sparse_tokens
    state = {n: 1.5 * value.to(like.device) for n, value in MODELS[0].state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


@torch.no_grad()
def average(model: FastSTELLARModel) -> FastSTELLARModel:
    for own, other in zip(model.parameters(), MODELS[1].parameters(), strict=True):
        own.lerp_(other.to(own), 0.5)
    return model


def average_data(model: FastSTELLARModel) -> FastSTELLARModel:
    for own, other in zip(model.parameters(), MODELS[1].parameters(), strict=True):
        own.data.mul_(0.5).add_(other.data.to(own.device), alpha=0.5)
    return model


@torch.no_grad()
def prune(model: FastSTELLARModel) -> FastSTELLARModel:
    weight = model.encoder.encoder.layer[0].attention.attention.value.weight
    weight[weight.abs() < weight.abs().median()] = 0
    return model


def replace(model: FastSTELLARModel) -> FastSTELLARModel:
    model.sparse_tokens = torch.nn.Parameter(model.sparse_tokens.detach().flip(0) * 2)
    return model


def graft(model: FastSTELLARModel) -> FastSTELLARModel:
    block = copy.deepcopy(MODELS[1].encoder.encoder.layer[1])
    model.encoder.encoder.layer[1] = block.to(model.sparse_tokens)
    return model


def freeze(model: FastSTELLARModel) -> FastSTELLARModel:
    return model.requires_grad_(not model.sparse_tokens.requires_grad)


def round_block(model: FastSTELLARModel) -> FastSTELLARModel:
    model.encoder.encoder.layer[0].to(torch.bfloat16).to(model.sparse_tokens.dtype)
    return model


CHANGES: dict[str, Callable[[FastSTELLARModel], FastSTELLARModel]] = {
    "train": train,
    "load": load,
    "load in place of": load_in_place_of,
    "average": average,
    "average by .data": average_data,
    "prune": prune,
    "replace a parameter": replace,
    "replace a block": graft,
    "freeze or thaw": freeze,
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "round a block": round_block,
    "move": lambda model: model.to("cpu"),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


MOVES: dict[str, Callable[[FastSTELLARModel], FastSTELLARModel]] = {
    "to the GPU": lambda model: model.cuda(),
    "to the CPU": lambda model: model.cpu(),
    "there and back": lambda model: model.cpu().cuda(),
}


def assert_current(model: FastSTELLARModel) -> None:
    """The bits of a copy, which has nothing packed; and in full precision about what the reference
    gives. How close an engine is to that, on models that are not drawn, other tests say.

    A GPU may round otherwise in a graph, and in half precision: less than any change is seen by."""
    x = X.to(model.sparse_tokens.device)
    found, fresh = model.encode(x), copy.deepcopy(model).encode(x)
    for name, value in fresh.items():
        if value.is_cuda:
            assert torch.equal(found[name].isfinite(), value.isfinite()), name
            assert relative_error(_finite(found[name]), _finite(value)) < SEEN, name
        else:
            assert torch.equal(found[name], value), name
    if model.sparse_tokens.dtype in (torch.float32, torch.float64):
        for name, value in model.features(x).items():
            assert relative_error(found[name], value) < SEEN, name


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)


def play(model: FastSTELLARModel, changes: list[tuple[str, bool]]) -> None:
    assert_current(model)
    for name, gradients in changes:
        model = (CHANGES | MOVES)[name](model)
        with torch.set_grad_enabled(gradients):
            assert_current(model)


def sequences_of(names: Iterable[str]) -> st.SearchStrategy[list[tuple[str, bool]]]:
    return st.lists(st.tuples(st.sampled_from(list(names)), st.booleans()), max_size=8)


SEQUENCES = sequences_of(CHANGES)
CALM = [HealthCheck.too_slow, HealthCheck.data_too_large]


def on(backend: str) -> FastSTELLARModel:
    """A model of its own. Torch's backend packs it 15 times as fast as OpenVINO compiles it."""
    model = copy.deepcopy(MODELS[0])
    model.backend = backend
    return model


@settings(max_examples=50, deadline=None, suppress_health_check=CALM)
@given(SEQUENCES)
def test_no_sequence_finds_a_stale_result(changes):
    play(on("torch"), changes)


@pytest.mark.gpu
@settings(max_examples=50, deadline=None, suppress_health_check=CALM)
@given(sequences_of([*CHANGES, *MOVES]))
def test_no_sequence_on_a_gpu_finds_a_stale_result(changes):
    play(copy.deepcopy(MODELS[0]).cuda(), changes)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=CALM)
@given(SEQUENCES)
def test_no_stale_result_in_a_thousand_sequences(changes):
    play(on("torch"), changes)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=CALM)
@given(SEQUENCES)
def test_no_stale_result_of_the_backend_that_is_chosen(changes):
    play(on("auto"), changes)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name):
    """From an engine that was packed, each alone, and the ones that change values do."""
    model = copy.deepcopy(MODELS[0])
    with torch.no_grad():
        before = model.encode(X)["dense"]
    model = CHANGES[name](model)
    with torch.no_grad():
        assert_current(model)
        after = model.encode(X)["dense"]
    same = name in (
        "freeze or thaw",
        "round a block",
        "half",
        "bfloat16",
        "float",
        "double",
        "move",
        "copy",
        "pickle",
    )
    assert (relative_error(after, before) < SEEN) == same
