"""What code written for the published loader and its module does, and what it must not notice."""

import copy
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from budgets import SPATIAL, TENSOR, assert_same_features, assert_within_budget, entitlement
from checkpoints import images, relative_error, write_checkpoint, write_vqgan
from loader_workers import Encoded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import stellar_fast
from stellar_fast import CheckpointError, DownloadError
from stellar_fast.config import BackboneConfig
from stellar_fast.engine.engine import Engine
from stellar_fast.module import FEATURES, FastSTELLARModel, _few
from stellar_fast.reference import STELLARModel
from stellar_fast.reference.pretrain import training_loss
from stellar_fast.weights import hub

pytestmark = pytest.mark.numerical
TINY = BackboneConfig(32, 2, 2, 64, 16, 64)
X = images(3, 64, 64, 5)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    common = {"backbone": asdict(TINY), "num_sparse_tokens": 4, "num_decoder_layers": 1}
    write_checkpoint(path, "tiny", **common, seed=3)
    write_checkpoint(path, "pixels", **common, seed=3, pixel_head=True)
    write_vqgan(path / "vq.safetensors", 7)
    return path


@pytest.fixture
def model(folder) -> FastSTELLARModel:
    return stellar_fast.load_stellar("tiny", repo_id=folder)


@pytest.fixture(scope="module")
def whole(folder) -> FastSTELLARModel:
    """To pretrain; reading the tokenizer takes most of the time."""
    few = {"num_masks": 2, "num_local_crops": 2, "color_augmentation": False}
    return stellar_fast.load_stellar("tiny", "pretrain", folder / "vq.safetensors", folder, **few)


@pytest.fixture
def decoding(whole) -> FastSTELLARModel:
    return copy.deepcopy(whole).eval()


@pytest.fixture
def encodes(monkeypatch) -> Iterator[list[str]]:
    """What of an engine was called."""
    calls: list[str] = []
    for name in ("encode", "reconstruct"):
        own = getattr(Engine, name)

        def called(engine, *arguments, own=own, name=name, **keywords):
            calls.append(name)
            return own(engine, *arguments, **keywords)

        monkeypatch.setattr(Engine, name, called)
    return calls


def fast(model: STELLARModel, x: Tensor = X) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.encode(x)


def plain(model: STELLARModel, x: Tensor = X) -> dict[str, Tensor]:
    """The reference's features of the parameters as they are."""
    with torch.no_grad():
        return model.features(x)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two float32 evaluations of one formula."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one, other = found[name].double(), value.double()
        bound = TENSOR
        if name in ("spatial", "peak_dist"):
            one, other, bound = one - 1 / 4, other - 1 / 4, SPATIAL
        assert relative_error(one, other) < bound, name


# Loading


def test_the_loaders_arguments_are_the_published_ones(folder):
    vq = folder / "vq.safetensors"
    by_keyword = stellar_fast.load_stellar(
        model="tiny",
        purpose="reconstruct",
        vq_model=vq,
        repo_id=str(folder),
        device="cpu",
        revision=None,
        local_files_only=True,
    )
    by_place = stellar_fast.load_stellar("tiny", "encode", None, folder, "cpu", None, False)
    by_other_name = stellar_fast.load_stellar("tiny", repo=folder)
    for model in (by_keyword, by_place, by_other_name):
        assert isinstance(model, nn.Module) and isinstance(model, STELLARModel)
        assert not model.training
        assert torch.equal(model.sparse_tokens, by_keyword.sparse_tokens)
        assert next(model.parameters()).device == torch.device("cpu")
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith("tokenizer."), name
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("purpose", "parts"),
    [
        ("encode", {"encoder", "sparse_tokens", "dense_proj", "sparse_proj"}),
        ("reconstruct", {"decoder", "decoder_proj", "reconstruction_head", "tokenizer"}),
        ("pretrain", {"clustering_head", "cls_cluster_head"}),
    ],
)
def test_a_purpose_builds_what_the_published_loader_builds(folder, purpose, parts):
    model = stellar_fast.load_stellar("tiny", purpose, folder / "vq.safetensors", folder)
    whole = ["encode", "reconstruct", "pretrain"]
    expected = {"encoder", "sparse_tokens", "dense_proj", "sparse_proj", "position_embedding"}
    for one in whole[: whole.index(purpose) + 1]:
        if one == "reconstruct":
            expected |= {"decoder", "decoder_proj", "reconstruction_head", "tokenizer"}
        elif one == "pretrain":
            expected |= {"clustering_head", "cls_cluster_head"}
    found = {name.partition(".")[0] for name in model.state_dict()}
    assert found == expected and parts <= found
    assert model.training == (purpose == "pretrain")
    if purpose == "pretrain":
        assert (model.masking_ratio, model.num_masks, model.num_local_crops) == (0.75, 8, 8)


def test_errors_come_in_the_published_order(folder, tmp_path):
    with pytest.raises(ValueError, match="'embed'"):
        stellar_fast.load_stellar("nothing", "embed", repo_id="./nowhere")
    with pytest.raises(ValueError, match="has: tiny, pixels"):
        stellar_fast.load_stellar("nothing", repo_id=folder)
    with pytest.raises(DownloadError):
        stellar_fast.load_stellar("tiny", repo_id="./nowhere")
    with pytest.raises(ValueError, match="needs vq_model"):
        stellar_fast.load_stellar("tiny", "reconstruct", repo_id=folder)
    said = tmp_path / "said"
    shutil.copytree(folder, said)
    entry = {"embed_dim": 768, "patch_size": 16, "image_size": 224, "recon_type": "vq"}
    config = json.loads((said / "config.json").read_text())
    config["models"]["tiny"] |= entry
    del config["models"]["tiny"]["backbone"]
    (said / "config.json").write_text(json.dumps(config))
    (said / "tiny.safetensors").unlink()
    with pytest.raises(ValueError, match="needs vq_model"):  # before weights are looked for
        stellar_fast.load_stellar("tiny", "reconstruct", repo_id=said)
    with pytest.raises(DownloadError, match=r"tiny\.safetensors is missing"):
        stellar_fast.load_stellar("tiny", repo_id=said)
    with pytest.raises(CheckpointError, match="makes pixels itself"):
        stellar_fast.load_stellar("pixels", "reconstruct", "vq.bin", folder)
    with pytest.raises(TypeError, match="only purpose='pretrain' takes 'num_masks'"):
        stellar_fast.load_stellar("tiny", repo_id=folder, num_masks=3)
    with pytest.raises(ValueError, match="'fp7'"):
        stellar_fast.load_stellar("tiny", repo_id=folder, precision="fp7")


def test_weights_drawn_for_a_module_are_those_drawn_for_an_engine(folder):
    keywords = {"weights": "synthetic", "device": "cpu"}
    engine = stellar_fast.load("tiny", repo=folder, precision="fp32", **keywords)
    model = stellar_fast.load_stellar("tiny", repo_id=folder, **keywords)
    found = fast(model)
    assert_same_features({name: found[name] for name in engine.encode(X)}, engine.encode(X))


def test_a_config_of_the_newer_layout_is_honoured(folder, tmp_path):
    """`embed_dim` in the place of a backbone, and what training alone has."""
    published = load_file(folder / "pixels.safetensors")
    clusters = {"clustering_head.layer.weight", "cls_cluster_head.layer.weight"}
    state = {
        name: value[:5].clone() if name in clusters else value
        for name, value in published.items()
        if not name.startswith("cls_cluster_head.")
    }
    save_file(state, tmp_path / "small.safetensors")
    entry = json.loads((folder / "config.json").read_text())["models"]["pixels"]
    entry |= {"weights": "small.safetensors", "do_cls": False, "num_clusters": 5}
    entry |= {"recon_type": "pixel"}
    (tmp_path / "config.json").write_text(json.dumps({"models": {"z": entry, "a": entry}}))
    model = stellar_fast.load_stellar("a", "pretrain", repo_id=tmp_path)
    assert (model.num_clusters, model.do_cls, model.tokenizer) == (5, False, None)
    assert model.clustering_head.layer.weight.shape == (5, 256)
    assert stellar_fast.list_models(repo_id=tmp_path) == ["z", "a"]
    assert len(stellar_fast.list_models()) == 5
    entry |= {"embed_dim": 768, "patch_size": 8, "image_size": 64}
    del entry["backbone"]
    (tmp_path / "config.json").write_text(json.dumps({"models": {"a": entry}}))
    found = hub.read_config(tmp_path / "config.json", "a").backbone
    assert found == BackboneConfig(768, 12, 12, 3072, 8, 64)
    for wrong in ({"embed_dim": 512}, {"num_clusters": 0}, {"do_cls": 1}, {"recon_type": 3}):
        (tmp_path / "config.json").write_text(json.dumps({"models": {"a": entry | wrong}}))
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            stellar_fast.load_stellar("a", repo_id=tmp_path)


def test_names_of_models_come_from_the_repository_that_is_asked(folder, monkeypatch):
    asked = []

    def fetch(*arguments, **keywords):
        asked.append((*arguments[:3], keywords["local_files_only"]))
        return folder / "config.json"

    monkeypatch.setattr(hub, "_fetch", fetch)
    found = stellar_fast.list_models(repo_id="someone/stellar", local_files_only=True)
    assert found == ["tiny", "pixels"]
    stellar_fast.list_models(revision="v2")
    assert len(stellar_fast.list_models()) == 5
    assert asked == [
        ("someone/stellar", "config.json", None, True),
        ("microsoft/STELLAR", "config.json", "v2", False),
    ]


# Features


@pytest.mark.parametrize("device", DEVICES)
def test_the_cards_usage(folder, device):
    """Line by line, as the model card has it."""
    model = stellar_fast.load_stellar("tiny", repo_id=folder, device=device)
    image = X.to(next(model.parameters()).device)
    with torch.no_grad():
        out = model.encode(image)
    assert out["sparse"].shape == (3, 4, 32)
    assert out["spatial"].shape == (3, 16, 4)
    assert out["cls"].shape == (3, 1, 32)
    assert out["dense"].shape == (3, 16, 32)
    assert out["lowrank"].shape == (3, 16, 32)
    model = stellar_fast.load_stellar(
        "tiny", purpose="reconstruct", vq_model=folder / "vq.safetensors", repo_id=folder
    ).to(device)
    with torch.no_grad():
        feats = model.encode(image)
        out = model.reconstruct(feats)
        assert out["reconstruction"].shape == (3, 3, 64, 64)
        assert set(out) == {"reconstruction", "tokens", "logits"}
        again = model.reconstruct(feats["sparse"], feats["spatial"])
    assert relative_error(again["logits"], out["logits"]) < TENSOR
    model = stellar_fast.load_stellar(
        "tiny", purpose="pretrain", vq_model=folder / "vq.safetensors", repo_id=folder
    ).to(device)
    assert model.training and model.tokenizer is not None


@pytest.mark.parametrize("device", DEVICES)
def test_features_are_the_references_and_an_engine_makes_them(model, encodes, device):
    model.to(device)
    x = X.to(device)
    found = fast(model, x)
    assert list(found) == list(FEATURES) and encodes == ["encode"]
    assert not any(value.requires_grad for value in found.values())
    assert_close(found, plain(model, x))
    for given in ({"image": x, "labels": None}, (X * 255).round().byte(), X.numpy()):
        assert list(fast(model, given)) == list(FEATURES)
    with torch.inference_mode():
        inferred = model.encode(x)
    assert all(torch.equal(inferred[name], value) for name, value in found.items())
    assert not fast(model, x[:0])["cls"].numel()
    assert len(encodes) == 6


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_flow_through_encode(model, encodes, device):
    x = X.clone().to(device).requires_grad_()
    model.to(device)
    found = model.encode(x)
    assert [name for name, value in found.items() if not value.requires_grad] == ["peak_dist"]
    (found["sparse"].square().sum() + found["lowrank"].sum()).backward()
    assert x.grad.abs().sum() > 0 and model.sparse_tokens.grad.abs().sum() > 0
    assert not encodes
    model.requires_grad_(False)
    assert model.encode(x)["cls"].requires_grad  # of the images
    assert not encodes
    assert not model.encode(x.detach())["cls"].requires_grad
    assert encodes == ["encode"]
    # as with an input of bytes, which has no gradient
    model.requires_grad_(True)
    assert model.encode((X * 255).byte())["cls"].requires_grad


def test_only_the_parameters_that_are_used_decide(decoding, encodes):
    model = decoding
    for part in (model.encoder, model.dense_proj, model.sparse_proj):
        part.requires_grad_(False)
    model.sparse_tokens.requires_grad_(False)
    features = model.encode(X)  # the decoder is trained, on frozen features
    assert encodes == ["encode"] and not features["lowrank"].requires_grad
    logits = model.reconstruct(features)["logits"]
    assert logits.requires_grad and encodes == ["encode"]
    with torch.no_grad():
        found = model.reconstruct(features)
    assert encodes == ["encode", "reconstruct"]
    assert relative_error(found["logits"], logits) < TENSOR


def test_reconstruct_as_published(folder, decoding, encodes):
    model = decoding.requires_grad_(False)
    features = model.encode(X)
    expected = model.reconstruct(features)
    sparse, spatial = features["sparse"], features["spatial"]
    for found in (
        model.reconstruct(sparse=sparse, spatial=spatial),
        model.reconstruct({"lowrank": None, "sparse": sparse, "spatial": spatial}),
        model.reconstruct(features, spatial.flip(1)),
    ):
        assert_same_features(found, expected)
    assert encodes.count("reconstruct") == 4
    with pytest.raises(ValueError, match="spatial"):
        model.reconstruct(sparse)
    pixels = stellar_fast.load_stellar("pixels", "reconstruct", repo_id=folder).requires_grad_(
        False
    )
    found = pixels.reconstruct(pixels.encode(X))
    assert set(found) == {"reconstruction", "logits"} and found["logits"] is found["reconstruction"]
    with pytest.raises(RuntimeError, match="no decoder"):
        stellar_fast.load_stellar("tiny", repo_id=folder).reconstruct(features)


def test_image_reconstruction_is_the_training_forwards(decoding):
    decoded = decoding.forward_decoder(plain(decoding)["lowrank"])
    found = decoding.image_reconstruction(decoded, X)
    assert list(found) == ["VQ-CE", "x_hat", "x_original"]
    tokens = decoding.tokenizer.encode(X)
    expected = F.cross_entropy(found["x_hat"].flatten(0, 1), tokens.flatten())
    assert found["VQ-CE"].item() == pytest.approx(expected.item())
    # as the published evaluator does it
    pixels = decoding.tokenizer.decode(found["x_hat"].argmax(dim=-1))
    assert pixels.shape == X.shape


def test_the_overshoot_of_a_resize_passes_and_more_does_not(model):
    over = X * 2 - 0.5
    assert_close(fast(model, over), plain(model, over))
    for wrong, message in ((X * 255, "0..255 go in as uint8"), (X * 4 - 2, "inside the model")):
        for run in (fast, FastSTELLARModel.encode):
            with pytest.raises(ValueError, match=message):
                run(model, wrong)


def test_public_names_of_the_module(model):
    assert model.encoder_dim == model.encoder.config.hidden_size == 32
    cls, sparse, dense = model.forward_image(X)
    expected = plain(model)
    for found, name in ((cls, "cls"), (sparse, "sparse"), (dense, "dense")):
        assert torch.equal(found, expected[name])
    assert torch.equal(model.spatial_distribution(dense, sparse), expected["spatial"])
    again = model.forward_encoder(model.patch_embedding(X, interpolate_pos_encoding=True))
    for found, one in zip(again, (cls, sparse, dense), strict=True):
        assert relative_error(found, one) < TENSOR
    index, plan = model.match_tokens(sparse.repeat_interleave(2, dim=0).flip(1), sparse)
    assert index.tolist() == [[3, 2, 1, 0]] * 6 and plan.shape == (6, 4, 4)
    model.update_teacher()
    model.sync_teacher_across_processes()
    predictions = model({"image": X}, mode="eval")["predictions"]
    assert list(predictions) == list(FEATURES)


# What modules do


def assert_within_the_budget_of(dtype, model: STELLARModel, found: dict[str, Tensor]) -> None:
    """Features of `model`, as far from float64 as plain PyTorch in `dtype` is, twice at most."""
    exactly = copy.deepcopy(model).double()
    exact, plainly = plain(exactly, X.double()), plain(copy.deepcopy(model).to(dtype))
    sound = entitlement(lambda: plain(exactly, X.double()), exact, dtype, exactly)
    for name, value in exact.items():
        assert_within_budget(found[name], plainly[name], value, dtype, sound[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_choose_the_dtype_of_features(model, encodes, dtype):
    found = fast(copy.deepcopy(model).to(dtype))
    assert {value.dtype for value in found.values()} == {dtype} and encodes == ["encode"]
    assert_within_the_budget_of(dtype, model, found)
    assert fast(copy.deepcopy(model).half())["cls"].dtype == torch.float16


def test_float64_is_the_references(model, encodes):
    model.double()
    assert all(torch.equal(value, plain(model)[name]) for name, value in fast(model).items())
    assert not encodes


def test_autocast(model, encodes):
    expected = fast(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fast(model)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_within_the_budget_of(torch.bfloat16, model, found)
    assert not torch.equal(found["cls"], expected["cls"])
    assert all(torch.equal(value, expected[name]) for name, value in fast(model).items())
    assert len(encodes) == 3


def test_state_dicts_go_both_ways(model, folder):
    published = load_file(folder / "tiny.safetensors")
    reference = STELLARModel(
        4, num_decoder_layers=1, vit_config=TINY, do_recon=False, do_clustering=False
    )
    state = model.state_dict()
    assert all(torch.equal(value, published[name]) for name, value in state.items())
    assert not any(reference.load_state_dict(state))
    other = {name: value + 0.01 for name, value in state.items()}
    assert not any(model.load_state_dict(other))
    assert_close(fast(model), plain(model))
    keys = model.load_state_dict(published, strict=False)
    assert not keys.missing_keys and set(keys.unexpected_keys) == published.keys() - state.keys()


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
        assert all(torch.equal(value, before[name]) for name, value in fast(twin).items())
        with torch.no_grad():
            twin.sparse_tokens.mul_(2)
        assert not torch.equal(fast(twin)["sparse"], before["sparse"])
        assert_close(fast(twin), plain(twin))
    assert all(torch.equal(value, before[name]) for name, value in fast(model).items())


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


@pytest.mark.parametrize("device", DEVICES)
def test_a_probe_around_the_module_trains(model, encodes, device):
    probe = Probe(model).to(device)
    optimizer = torch.optim.AdamW((p for p in probe.parameters() if p.requires_grad), lr=0.1)
    inputs, labels = {"image": X.to(device)}, torch.arange(3, device=device)
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
        assert_close(found, plain(model))
        setattr(parent, name, base)
        assert_close(fast(model), before)


def test_pruning_and_parametrizations(model):
    layer = model.encoder.encoder.layer[0].output.dense
    before = fast(model)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    pruned = fast(model)
    assert_close(pruned, plain(model))
    assert relative_error(pruned["cls"], before["cls"]) > 1e-3
    prune.remove(layer, "weight")
    assert_close(fast(model), pruned)
    nn.utils.parametrizations.weight_norm(layer)
    assert_close(fast(model), pruned)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    assert relative_error(fast(model)["cls"], pruned["cls"]) > 1e-3


def test_functional_calls_and_transforms(model):
    frozen = {name: 2 * value.detach() for name, value in model.named_parameters()}
    found = torch.func.functional_call(_Encodes(model), _prefixed(frozen), (X,))
    assert_close(fast(model), plain(model))
    twin = copy.deepcopy(model)
    twin.load_state_dict(frozen, strict=False)
    assert_close(found, plain(twin))
    _, tangent = torch.func.jvp(lambda x: model.encode(x)["cls"], (X,), (torch.ones_like(X),))
    assert tangent.abs().sum() > 0
    rows = torch.vmap(lambda x: model.encode(x[None])["cls"][0])(X)
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
def test_compiled_the_engine_is_an_op_of_the_graph(model, encodes, backend):
    expected = plain(model)
    compiled = torch.compile(model.encode, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_close(compiled(X), expected)
    assert encodes == ["encode"]
    found = compiled(X)
    assert found["sparse"].requires_grad
    assert_close({name: value.detach() for name, value in found.items()}, expected)
    assert encodes == ["encode"]
    with torch.no_grad():
        model.sparse_tokens.mul_(2)
        assert_close(compiled({"image": X}), plain(model))
        whole = torch.compile(_Encodes(model), backend=backend)
        assert_close(whole(X), plain(model))


def test_on_the_meta_device_the_reference_gives_shapes(model):
    with torch.no_grad():
        found = copy.deepcopy(model).to("meta").encode(X.to("meta"))
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in plain(model).items()
    }


# Processes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_encode(model, context, packed):
    expected = plain(model)["cls"]
    if packed:
        fast(model)
    loader = DataLoader(
        Encoded(model, X), batch_size=3, num_workers=2, multiprocessing_context=context, timeout=120
    )
    assert relative_error(next(iter(loader)), expected) < TENSOR
    assert relative_error(fast(model)["cls"], expected) < TENSOR


# Nothing stale


def test_what_changes_without_a_trace_in_versions_is_seen(model):
    """Weights written through `.data`, NumPy or a flat view: autograd does not count these."""
    changes = {
        "data": lambda: model.encoder.layernorm.bias.data.add_(1),
        "numpy": lambda: model.sparse_tokens.detach().numpy().__imul__(2),
        "flat": lambda: model.dense_proj.weight.data.view(-1).copy_(torch.linspace(-1, 1, 1024)),
        "average": lambda: [
            p.data.mul_(0.9).add_(torch.ones_like(p), alpha=0.1) for p in model.parameters()
        ],
        "prune": lambda: _prune_data(model.encoder.encoder.layer[1].output.dense.weight),
        "prune columns": lambda: model.sparse_proj.weight.data[:, 20:28].zero_(),
        "set": lambda: setattr(model.dense_proj.bias, "data", torch.ones(32)),
        "temperature": lambda: setattr(model, "spatial_temp", 0.5),
    }
    for name, change in changes.items():
        before = fast(model)
        change()
        found = fast(model)
        assert any(not torch.equal(found[key], value) for key, value in before.items()), name
        fresh = fast(copy.deepcopy(model))
        assert all(torch.equal(found[key], value) for key, value in fresh.items()), name


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


def test_one_number_changed_in_place_is_seen(model):
    for name, parameter in model.named_parameters():
        if ".pooler." in name:
            continue
        fast(model)
        with torch.no_grad():
            parameter.view(-1)[-1] += 3.0
        found, fresh = fast(model), fast(copy.deepcopy(model))
        assert all(torch.equal(value, fresh[key]) for key, value in found.items()), name


def test_an_unchanged_module_is_packed_once(model, monkeypatch):
    packs = []
    own = FastSTELLARModel._pack

    def pack(self, *arguments):
        packs.append(self)
        return own(self, *arguments)

    monkeypatch.setattr(FastSTELLARModel, "_pack", pack)
    for _ in range(3):
        fast(model)
        fast(model, X[:, :, :32])
        model.eval().requires_grad_(False).cpu().float()
        model.state_dict()
    assert len(packs) == 3  # `float` may have moved what it found as it was
    fast(model)
    fast(model)
    assert len(packs) == 4


def test_memory_is_the_parameters_and_the_packed_weights(model):
    """What was packed before goes before it is packed anew, and when the module moves."""
    import gc
    import weakref

    fast(model)
    engine = weakref.ref(model._packed.engines[next(iter(model._packed.engines))][1])
    model.double()
    gc.collect()
    assert engine() is None and not model._packed.engines


def test_many_threads_may_encode(model):
    from concurrent.futures import ThreadPoolExecutor

    expected = fast(model)["cls"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fast(model)["cls"], range(12)))
    assert all(torch.equal(each, expected) for each in found)


def test_training_then_validation(folder):
    """The published loop: losses with gradients, validation without, on weights that moved."""
    few = {"num_masks": 2, "num_local_crops": 2, "color_augmentation": False}
    model = stellar_fast.load_stellar("pixels", "pretrain", repo_id=folder, **few)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {
        "image": X,
        "labels": torch.arange(3),
        "global_views": images(6, 64, 64, 1).unflatten(0, (3, 2)),
        "local_views": images(6, 32, 32, 2).unflatten(0, (3, 2)),
    }
    for _ in range(2):
        optimizer.zero_grad()
        training_loss(model(batch)["predictions"]).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert training_loss(model(batch, mode="valid")["predictions"]).isfinite()
        assert_close(fast(model), plain(model))
        model.train()
