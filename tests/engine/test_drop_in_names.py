"""The published module's names, line by line of its card and by what is written around it."""

import io
import json
from dataclasses import asdict
from inspect import Parameter, signature

import pytest
import torch
import torch.nn.functional as F
from budgets import TENSOR, assert_same_features
from checkpoints import images, relative_error
from drop_in import TINY, X, fast, plain
from pretraining import unchanged
from safetensors.torch import load_file

import stellar_fast
from stellar_fast.module import FEATURES, FastSTELLARModel
from stellar_fast.reference import STELLARModel
from stellar_fast.weights.names import canonical

pytestmark = pytest.mark.numerical
REQUIRED = Parameter.empty


# Methods and their arguments, by place and by name, with what stands for those left out.
SIGNATURES = {
    "forward": {"inputs": REQUIRED, "mode": "train"},
    "reconstruct": {"sparse": REQUIRED, "spatial": None},
    "patch_embedding": {"image": REQUIRED, "interpolate_pos_encoding": False},
    "spatial_distribution": {"dense": REQUIRED, "sparse": REQUIRED},
    "forward_encoder": {"embeddings": REQUIRED},
    "forward_decoder": {"embeddings": REQUIRED},
    "image_reconstruction": {"decoder_output": REQUIRED, "image": REQUIRED},
    "forward_image": {"image": REQUIRED},
    "forward_masked": {"image": REQUIRED, "ratio": 0.75},
    "forward_teacher": {"image": REQUIRED},
    "update_teacher": {},
    "sync_teacher_across_processes": {},
    "match_tokens": {"sparse_pred": REQUIRED, "sparse_tgt": REQUIRED, "token_filter": None},
    "rearrange_sparse_targets": {"assignments": REQUIRED, "index_tgt": REQUIRED},
    "contrastive_loss": {
        "logits_pred": REQUIRED,
        "cluster_tgt": REQUIRED,
        "index_tgt": None,
        "pred_filter": None,
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_are_called_as_published(name):
    parameters = signature(getattr(FastSTELLARModel, name)).parameters
    found = {name: one.default for name, one in parameters.items() if name != "self"}
    assert list(found.items()) == list(SIGNATURES[name].items())


def test_the_cards_features(published, device):
    """Line by line, as the model card has it."""
    assert stellar_fast.list_models()[:2] == ["stellar-b16", "stellar-l16"]
    model = stellar_fast.load_stellar("tiny", repo_id=published, device=device)
    image = X[:1].to(next(model.parameters()).device)
    with torch.no_grad():
        out = model.encode(image)
    assert out["sparse"].shape == (1, 4, 32)
    assert out["spatial"].shape == (1, 16, 4)
    assert out["cls"].shape == (1, 1, 32)
    assert out["dense"].shape == (1, 16, 32)
    assert out["lowrank"].shape == (1, 16, 32)
    assert relative_error(out["lowrank"], out["spatial"] @ out["sparse"]) < TENSOR
    buffer = io.BytesIO()
    torch.save({key: out[key].cpu() for key in ("sparse", "spatial")}, buffer)
    buffer.seek(0)
    assert torch.load(buffer)["sparse"].shape == (1, 4, 32)


def test_the_cards_reconstruction(published, device):
    vq_model = str(published / "vq.safetensors")
    model = stellar_fast.load_stellar(
        model="tiny", purpose="reconstruct", vq_model=vq_model, repo_id=published, device=device
    )
    with torch.no_grad():
        features = model.encode(X.to(device))
        out = model.reconstruct(features)
        again = model.reconstruct(features["sparse"], features["spatial"])
    assert out["reconstruction"].shape == (3, 3, 64, 64)
    assert out["reconstruction"].min() >= 0 and out["reconstruction"].max() <= 1
    assert set(out) == {"reconstruction", "tokens", "logits"}
    assert_same_features(again, out)


def test_the_cards_training(published, device):
    vq_model = published / "vq.safetensors"
    model = stellar_fast.load_stellar("tiny", "pretrain", vq_model, published, device)
    assert model.training and model.tokenizer is not None
    model.augment = unchanged  # which draws from torch's stream
    views = images(6, 64, 64, 1).unflatten(0, (3, 2)).to(device)
    batch = {"image": X, "labels": X, "global_views": views, "local_views": views}
    predictions = model({name: value.to(device) for name, value in batch.items()})["predictions"]
    losses = {name: value for name, value in predictions.items() if "loss" in name}
    assert set(losses) == {
        "koleo_loss",
        "clustering_loss",
        "cls_clustering_loss",
        "mask_loss",
        "cls_loss",
    }
    (0.05 * predictions["VQ-CE"] + sum(losses.values())).backward()
    assert model.sparse_tokens.grad.isfinite().all()


def test_the_cards_loading_by_hand(published):
    entry = json.loads((published / "config.json").read_text())["models"]["tiny"]
    model = STELLARModel(
        num_sparse_tokens=entry["num_sparse_tokens"],
        num_decoder_layers=entry["num_decoder_layers"],
        spatial_temp=entry["spatial_temp"],
        vit_pretrained=entry["backbone"],
        do_recon=False,
        do_clustering=False,
        vq_model=None,
    )
    state = load_file(published / entry["weights"])
    assert not model.load_state_dict(state, strict=False).missing_keys
    model = model.to("cpu").eval()
    assert_same_features(plain(model), fast(stellar_fast.load_stellar("tiny", repo_id=published)))


def test_the_encoder_is_called_as_a_vit_of_transformers(model, x):
    pixels = model.normalize(x)
    whole = model.encoder(pixel_values=pixels, output_hidden_states=True)
    embeddings = model.encoder.embeddings(pixels, interpolate_pos_encoding=True)
    assert torch.equal(embeddings, model.patch_embedding(x))
    assert embeddings.shape == (3, 17, 32)
    assert len(whole.hidden_states) == 1 + model.encoder.config.num_hidden_layers
    assert torch.equal(whole.hidden_states[0], embeddings)
    stack = model.encoder.encoder(embeddings)
    assert torch.equal(stack[0], whole.hidden_states[-1])
    assert torch.equal(model.encoder.layernorm(stack[0]), whole.last_hidden_state)
    pooled = model.encoder.pooler.dense(whole.last_hidden_state[:, 0]).tanh()
    assert relative_error(whole.pooler_output, pooled) < TENSOR
    without = model.encoder(pixels)
    assert without.hidden_states is stack.hidden_states is None
    assert torch.equal(without[0], whole[0])
    config = model.encoder.config
    assert (config.hidden_size, config.patch_size, config.image_size) == (32, 16, 64)


def test_hidden_states_are_those_of_transformers(model):
    """Of the library itself, with the same weights."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ViTModel"):
        pytest.skip("transformers cannot be used with this torch")
    sizes = asdict(TINY)
    settings = transformers.ViTConfig(**sizes, layer_norm_eps=1e-12, attn_implementation="eager")
    theirs = transformers.ViTModel(settings).eval()
    state = canonical({f"encoder.{name}": value for name, value in theirs.state_dict().items()})
    model.encoder.load_state_dict({n.removeprefix("encoder."): v for n, v in state.items()})
    for side in (64, 96):
        pixels = model.normalize(images(2, side, side, 8).to(model.sparse_tokens.device))
        options = {"interpolate_pos_encoding": side != 64, "output_hidden_states": True}
        with torch.no_grad():
            found = model.encoder(pixel_values=pixels, **options)
            expected = theirs(pixel_values=pixels.cpu(), **options)
        assert relative_error(found.last_hidden_state, expected.last_hidden_state) < TENSOR
        assert relative_error(found.pooler_output, expected.pooler_output) < TENSOR
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert relative_error(one, other) < TENSOR


@pytest.mark.parametrize(
    "part", ["embeddings", "encoder", "layernorm", "embeddings.patch_embeddings.projection"]
)
def test_hooks_of_the_encoders_parts_are_heard(model, encodes, part):
    seen = []
    module = model.encoder.get_submodule(part)
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = fast(model)
    assert len(seen) == 1 and not encodes
    shapes = {
        "embeddings": (3, 17, 32),
        "encoder": (3, 21, 32),
        "layernorm": (3, 21, 32),
        "embeddings.patch_embeddings.projection": (3, 32, 4, 4),
    }
    tensor = seen[0][0] if part == "encoder" else seen[0]
    assert tensor.shape == shapes[part]
    module._forward_hooks.clear()
    assert_same_features(fast(model), found)
    assert encodes == ["encode"]


def test_image_reconstruction_is_the_training_forwards(decoding, x):
    decoded = decoding.forward_decoder(plain(decoding)["lowrank"])
    found = decoding.image_reconstruction(decoded, x)
    assert list(found) == ["VQ-CE", "x_hat", "x_original"]
    tokens = decoding.tokenizer.encode(x)
    expected = F.cross_entropy(found["x_hat"].flatten(0, 1), tokens.flatten())
    assert found["VQ-CE"].item() == pytest.approx(expected.item())
    # as the published evaluator does it
    pixels = decoding.tokenizer.decode(found["x_hat"].argmax(dim=-1))
    assert pixels.shape == x.shape


def test_public_names_of_the_module(model, x):
    assert model.encoder_dim == model.encoder.config.hidden_size == 32
    cls, sparse, dense = model.forward_image(x)
    expected = plain(model)
    for found, name in ((cls, "cls"), (sparse, "sparse"), (dense, "dense")):
        assert torch.equal(found, expected[name])
    assert torch.equal(model.spatial_distribution(dense, sparse), expected["spatial"])
    again = model.forward_encoder(model.patch_embedding(x, interpolate_pos_encoding=True))
    for found, one in zip(again, (cls, sparse, dense), strict=True):
        assert relative_error(found, one) < TENSOR
    assert torch.equal(model.forward_teacher(x)[1], sparse)  # it has no teacher
    index, plan = model.match_tokens(sparse.repeat_interleave(2, dim=0).flip(1), sparse)
    assert index.tolist() == [[3, 2, 1, 0]] * 6 and plan.shape == (6, 4, 4)
    model.update_teacher()
    model.sync_teacher_across_processes()
    predictions = model({"image": x}, mode="eval")["predictions"]
    assert list(predictions) == list(FEATURES)
