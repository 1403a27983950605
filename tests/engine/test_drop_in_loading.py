"""The published loader's arguments, errors and files."""

import json
import shutil

import pytest
import torch
from budgets import assert_same_features
from drop_in import X, fast
from safetensors.torch import load_file, save_file
from torch import nn

import stellar_fast
from stellar_fast import CheckpointError, DownloadError
from stellar_fast.config import BackboneConfig
from stellar_fast.reference import STELLARModel
from stellar_fast.weights import hub
from stellar_fast.weights.manifest import read_model

pytestmark = pytest.mark.numerical


def test_the_loaders_arguments_are_the_published_ones(published):
    vq = published / "vq.safetensors"
    by_keyword = stellar_fast.load_stellar(
        model="tiny",
        purpose="reconstruct",
        vq_model=vq,
        repo_id=str(published),
        device="cpu",
        revision=None,
        local_files_only=True,
    )
    by_place = stellar_fast.load_stellar("tiny", "encode", None, published, "cpu", None, False)
    by_other_name = stellar_fast.load_stellar("tiny", repo=published)
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
def test_a_purpose_builds_what_the_published_loader_builds(published, purpose, parts):
    model = stellar_fast.load_stellar("tiny", purpose, published / "vq.safetensors", published)
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


def test_errors_come_in_the_published_order(published, tmp_path):
    with pytest.raises(ValueError, match="'embed'"):
        stellar_fast.load_stellar("nothing", "embed", repo_id="./nowhere")
    with pytest.raises(ValueError, match="has: tiny, pixels"):
        stellar_fast.load_stellar("nothing", repo_id=published)
    with pytest.raises(DownloadError):
        stellar_fast.load_stellar("tiny", repo_id="./nowhere")
    with pytest.raises(ValueError, match="needs vq_model"):
        stellar_fast.load_stellar("tiny", "reconstruct", repo_id=published)
    said = tmp_path / "said"
    shutil.copytree(published, said)
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
        stellar_fast.load_stellar("pixels", "reconstruct", "vq.bin", published)
    with pytest.raises(TypeError, match="only purpose='pretrain' takes 'num_masks'"):
        stellar_fast.load_stellar("tiny", repo_id=published, num_masks=3)
    with pytest.raises(ValueError, match="'fp7'"):
        stellar_fast.load_stellar("tiny", repo_id=published, precision="fp7")


def test_weights_drawn_for_a_module_are_those_drawn_for_an_engine(published):
    keywords = {"weights": "synthetic", "device": "cpu"}
    engine = stellar_fast.load("tiny", repo=published, precision="fp32", **keywords)
    model = stellar_fast.load_stellar("tiny", repo_id=published, **keywords)
    found = fast(model)
    assert_same_features({name: found[name] for name in engine.encode(X)}, engine.encode(X))


def test_a_config_of_the_newer_layout_is_honoured(published, tmp_path):
    """`embed_dim` in the place of a backbone, and what training alone has."""
    tensors = load_file(published / "pixels.safetensors")
    clusters = {"clustering_head.layer.weight", "cls_cluster_head.layer.weight"}
    state = {
        name: value[:5].clone() if name in clusters else value
        for name, value in tensors.items()
        if not name.startswith("cls_cluster_head.")
    }
    save_file(state, tmp_path / "small.safetensors")
    entry = json.loads((published / "config.json").read_text())["models"]["pixels"]
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
    found = read_model(tmp_path / "config.json", "a")[0].backbone
    assert found == BackboneConfig(768, 12, 12, 3072, 8, 64)
    for wrong in ({"embed_dim": 512}, {"num_clusters": 0}, {"do_cls": 1}, {"recon_type": 3}):
        (tmp_path / "config.json").write_text(json.dumps({"models": {"a": entry | wrong}}))
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            stellar_fast.load_stellar("a", repo_id=tmp_path)


def test_names_of_models_come_from_the_repository_that_is_asked(published, monkeypatch):
    asked = []

    def fetch(*arguments, **keywords):
        asked.append((*arguments[:2], keywords["revision"], keywords["local_files_only"]))
        return published / "config.json"

    monkeypatch.setattr(hub, "fetch", fetch)
    found = stellar_fast.list_models(repo_id="someone/stellar", local_files_only=True)
    assert found == ["tiny", "pixels"]
    stellar_fast.list_models(revision="v2")
    assert len(stellar_fast.list_models()) == 5
    assert asked == [
        ("someone/stellar", "config.json", None, True),
        ("microsoft/STELLAR", "config.json", "v2", False),
    ]
