"""What is done with any module, and must not be noticed."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from budgets import TENSOR, assert_same_features
from checkpoints import images, relative_error
from drop_in import TINY, X, assert_same, fast, plain
from loader_workers import Encoded
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import stellar_fast
from stellar_fast.reference import STELLARModel
from stellar_fast.reference.pretrain import training_loss

pytestmark = pytest.mark.numerical


def test_state_dicts_go_both_ways(model, published):
    file = load_file(published / "tiny.safetensors")
    reference = STELLARModel(
        4, num_decoder_layers=1, vit_config=TINY, do_recon=False, do_clustering=False
    )
    state = model.state_dict()
    assert all(torch.equal(value.cpu(), file[name]) for name, value in state.items())
    assert not any(reference.load_state_dict(state))
    other = {name: value + 0.01 for name, value in state.items()}
    assert not any(model.load_state_dict(other))
    assert_same_features(fast(model), plain(model))
    keys = model.load_state_dict(file, strict=False)
    assert not keys.missing_keys and set(keys.unexpected_keys) == file.keys() - state.keys()


def test_copies_and_pickles_are_models_of_their_own(model):
    before = fast(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in copies:
        assert_same(fast(twin), before)
        with torch.no_grad():
            twin.sparse_tokens.mul_(2)
        assert not torch.equal(fast(twin)["sparse"], before["sparse"])
        assert_same_features(fast(twin), plain(twin))
    assert_same(fast(model), before)


class Probe(nn.Module):
    """As the published one: frozen once, the model called with the whole input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad = False
        self.normalize = nn.LayerNorm(32)
        self.classification_head = nn.Linear(32, 5)

    def forward(self, inputs):
        with torch.no_grad():
            features = self.model.encode(inputs)["sparse"]
        return self.classification_head(self.normalize(features.mean(1)))


def test_a_probe_around_the_module_trains(model, x, encodes, device):
    probe = Probe(model).to(device)
    optimizer = torch.optim.AdamW((p for p in probe.parameters() if p.requires_grad), lr=0.1)
    inputs, labels = {"image": x}, torch.arange(3, device=device)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(probe(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert len(encodes) == 8
    parallel = nn.DataParallel(probe)
    assert parallel(inputs).shape == (3, 5)
    torch.optim.swa_utils.AveragedModel(probe)(inputs)


def test_hooks_and_replaced_parts_are_heard(model, encodes):
    seen = []
    fast(model)  # an engine is there, and is not asked
    encodes.clear()
    block = model.encoder.encoder.layer[1]
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fast(model)
    assert seen == [(3, 21, 32)] and not encodes
    handle.remove()
    for layer in (block.output.dense, block.attention.attention.key, model.sparse_proj):
        handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(module))
        fast(model)
        assert seen[-1] is layer and not encodes
        handle.remove()
    fast(model)
    assert len(seen) == 4 and encodes == ["encode"]
    forward = block.forward
    block.forward = lambda x: seen.append("replaced") or forward(x)
    fast(model)
    assert seen[-1] == "replaced" and encodes == ["encode"]
    del block.forward
    fast(model)
    assert encodes == ["encode"] * 2

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x).flip(-1)

    for parent, name in (
        (block.attention.attention, "query"),
        (block.attention.output, "dense"),
        (block.intermediate, "dense"),
        (model, "dense_proj"),
    ):
        before, base = fast(model), getattr(parent, name)
        setattr(parent, name, Adapter(base))
        found = fast(model)
        assert relative_error(found["spatial"], before["spatial"]) > 1e-3, name
        assert_same_features(found, plain(model))
        setattr(parent, name, base)
        assert_same_features(fast(model), before)


def test_pruning_and_parametrizations(model):
    layer = model.encoder.encoder.layer[0].output.dense
    before = fast(model)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    pruned = fast(model)
    assert_same_features(pruned, plain(model))
    assert relative_error(pruned["cls"], before["cls"]) > 1e-3
    prune.remove(layer, "weight")
    assert_same_features(fast(model), pruned)
    nn.utils.parametrizations.weight_norm(layer)
    assert_same_features(fast(model), pruned)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    assert relative_error(fast(model)["cls"], pruned["cls"]) > 1e-3


def test_functional_calls_and_transforms(model, x):
    frozen = {name: 2 * value.detach() for name, value in model.named_parameters()}
    found = torch.func.functional_call(_Encodes(model), _prefixed(frozen), (x,))
    assert_same_features(fast(model), plain(model))
    twin = copy.deepcopy(model)
    twin.load_state_dict(frozen, strict=False)
    assert_same_features(found, plain(twin))
    _, tangent = torch.func.jvp(lambda x: model.encode(x)["cls"], (x,), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0
    rows = torch.vmap(lambda x: model.encode(x[None])["cls"][0])(x)
    assert relative_error(rows, plain(model)["cls"]) < TENSOR


class _Encodes(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.model.encode(x)


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_the_engine_is_an_op_of_the_graph(model, x, encodes, backend):
    expected = plain(model)
    compiled = torch.compile(model.encode, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same_features(compiled(x), expected)
    assert encodes == ["encode"]
    found = compiled(x)
    assert found["sparse"].requires_grad
    assert_same_features({name: value.detach() for name, value in found.items()}, expected)
    assert encodes == ["encode"]
    with torch.no_grad():
        model.sparse_tokens.mul_(2)
        assert_same_features(compiled({"image": x}), plain(model))
        whole = torch.compile(_Encodes(model), backend=backend)
        assert_same_features(whole(x), plain(model))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_encode(published, context, packed):
    """On a CPU: what was begun on a GPU does not survive a fork, in any program."""
    model = stellar_fast.load_stellar("tiny", repo_id=published)
    expected = plain(model)["cls"]
    if packed:
        fast(model)
    loader = DataLoader(
        Encoded(model, X), batch_size=3, num_workers=2, multiprocessing_context=context, timeout=120
    )
    assert relative_error(next(iter(loader)), expected) < TENSOR
    assert relative_error(fast(model)["cls"], expected) < TENSOR


def test_many_threads_may_encode(model):
    expected = fast(model)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: fast(model), range(12)):
            assert_same(found, expected)


def test_training_then_validation(published, x):
    """The published loop: losses with gradients, validation without, on weights that moved."""
    few = {"num_masks": 2, "num_local_crops": 2, "color_augmentation": False}
    model = stellar_fast.load_stellar(
        "pixels", "pretrain", repo_id=published, device=x.device, **few
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {
        "image": x,
        "labels": torch.arange(3),
        "global_views": images(6, 64, 64, 1).unflatten(0, (3, 2)).to(x.device),
        "local_views": images(6, 32, 32, 2).unflatten(0, (3, 2)).to(x.device),
    }
    for _ in range(2):
        optimizer.zero_grad()
        training_loss(model(batch)["predictions"]).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert training_loss(model(batch, mode="valid")["predictions"]).isfinite()
        assert_same_features(fast(model), plain(model))
        model.train()
