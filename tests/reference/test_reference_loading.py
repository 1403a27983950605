"""Published files into whole and partial reference models, in every spelling in the wild."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from checkpoints import images, respell, synthetic, write_vqgan
from safetensors.torch import save_file
from torch import nn

from stellar_fast.config import BackboneConfig, ModelConfig
from stellar_fast.errors import CheckpointError, DownloadError
from stellar_fast.reference import STELLARModel
from stellar_fast.reference.vqgan import VQGAN
from stellar_fast.weights import backbone, names

TINY = BackboneConfig(64, 2, 4, 128, 16, image_size=64)
CONFIG = ModelConfig("tiny", TINY, num_sparse_tokens=4, num_decoder_layers=1)
HEAD = {"reconstruction_head.weight", "reconstruction_head.bias"}


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Every tensor of a published file: decoder and heads too, no tokenizer."""
    return synthetic(names.published_shapes(CONFIG), seed=11)


@pytest.fixture(scope="module")
def vq_file(tmp_path_factory):
    return write_vqgan(tmp_path_factory.mktemp("vq") / "vqgan.bin", seed=7)


@pytest.fixture(scope="module")
def tokenizer(vq_file) -> VQGAN:
    return VQGAN.from_file(vq_file)


def build(**arguments) -> STELLARModel:
    parts = {"do_recon": False, "do_clustering": False, "vit_pretrained": TINY} | arguments
    return STELLARModel(4, num_decoder_layers=1, **parts)


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    for name in found.keys() & state.keys():
        assert torch.equal(found[name], state[name]), name


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("spell", [str, respell], ids=["published", "renamed"])
def test_encoder_only_build_loads_the_whole_file(published, spell, prefix):
    model = build()
    state = {prefix + spell(name): value for name, value in published.items()}
    keys = model.load_state_dict(state, strict=False)
    assert keys.missing_keys == []
    assert set(keys.unexpected_keys) == published.keys() - model.state_dict().keys()
    parts = {name.partition(".")[0] for name in model.state_dict()}
    assert parts == {"encoder", "sparse_tokens", "dense_proj", "sparse_proj", "position_embedding"}
    assert_holds(model, published)


def test_loading_leaves_the_callers_dict_alone(published):
    state = {f"model.{respell(name)}": value for name, value in published.items()}
    before = list(state)
    build(do_recon=True).load_state_dict(state, strict=False)
    assert list(state) == before


def test_a_module_that_holds_the_model_loads_the_same_files(published):
    holder = nn.Module()
    holder.model = build(do_recon=True)
    state = {f"model.{respell(name)}": value for name, value in published.items()}
    keys = holder.load_state_dict(state, strict=False)
    assert set(keys.missing_keys) == {f"model.{name}" for name in HEAD}
    assert {f"model.{name}" for name in HEAD} < set(keys.unexpected_keys)
    assert_holds(holder.model, {name: published[name] for name in published.keys() - HEAD})


def test_the_whole_model_holds_exactly_the_published_tensors(published, tokenizer):
    model = build(do_recon=True, do_clustering=True, vq_model=tokenizer)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = names.published_shapes(CONFIG)
    expected |= {f"tokenizer.{name}": shape for name, shape in names.vqgan_shapes().items()}
    assert shapes == expected
    saved = published | {f"tokenizer.{name}": v for name, v in tokenizer.state_dict().items()}
    keys = model.load_state_dict({f"model.{respell(name)}": v for name, v in saved.items()})
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_holds(model, saved)
    keys = model.load_state_dict(published, strict=False)
    assert not keys.unexpected_keys
    assert all(name.startswith("tokenizer.") for name in keys.missing_keys)


def test_a_teacher_brings_the_published_tensors():
    model = build(do_clustering=True, momentum_teacher=True)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    teacher = {k: v for k, v in shapes.items() if k.startswith("teacher_")}
    everything = names.published_shapes(CONFIG, teacher=True)
    assert teacher == {k: v for k, v in everything.items() if k.startswith("teacher_")}


def test_parts_not_asked_for_are_not_built():
    model = build(do_recon=True, do_clustering=True, do_cls=False)
    assert {name for name, _ in model.named_children()} == {
        "encoder",
        "dense_proj",
        "sparse_proj",
        "decoder",
        "decoder_proj",
        "position_embedding",
        "reconstruction_head",
        "clustering_head",
    }
    with pytest.raises(ValueError, match="do_clustering"):
        build(momentum_teacher=True)


def test_pixel_head_build_passes_over_the_code_head(published):
    model = build(do_recon=True)
    before = {name: model.state_dict()[name].clone() for name in HEAD}
    keys = model.load_state_dict(published, strict=False)
    assert set(keys.missing_keys) == HEAD
    assert set(keys.unexpected_keys) >= HEAD
    assert_holds(model, before | {name: published[name] for name in published.keys() - HEAD})
    with pytest.raises(RuntimeError, match=r"reconstruction_head\.weight"):
        model.load_state_dict(published, strict=True)


def test_pixel_head_file_fills_a_pixel_head():
    state = synthetic(names.published_shapes(CONFIG, pixel_head=True), seed=12)
    model = build(do_recon=True)
    assert model.load_state_dict(state, strict=False).missing_keys == []
    assert_holds(model, state)


def test_a_pixel_head_does_not_fit_where_a_tokenizer_is(tokenizer):
    state = synthetic(names.published_shapes(CONFIG, pixel_head=True), seed=12)
    with pytest.raises(RuntimeError, match=r"size mismatch for reconstruction_head\.weight"):
        build(do_recon=True, vq_model=tokenizer).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.encoder.layer.0.output.dense.weight",
        "sparse_tokens",
        "reconstruction_head.weight",
        "decoder.layernorm.bias",
    ],
)
def test_any_other_wrong_shape_is_an_error(published, name):
    state = published | {name: published[name][..., :-1].clone()}
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        build(do_recon=True).load_state_dict(state, strict=False)


def test_strict_loading_names_what_is_missing_and_what_is_unknown(published):
    model = build()
    own = {name: published[name] for name in model.state_dict()}
    assert not any(model.load_state_dict(own, strict=True))
    own.pop("sparse_tokens")
    with pytest.raises(RuntimeError, match=r"Missing key.*sparse_tokens"):
        model.load_state_dict(own, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*clustering_head"):
        model.load_state_dict(published, strict=True)


def test_tokenizer_tensors_are_unexpected_without_a_tokenizer(published, tokenizer):
    extra = {"tokenizer.quantize.embedding.weight": tokenizer.quantize.embedding.weight}
    keys = build().load_state_dict(published | extra, strict=False)
    assert set(extra) <= set(keys.unexpected_keys)
    assert keys.missing_keys == []


def test_one_tensor_in_two_spellings_is_an_error(published):
    name = "encoder.encoder.layer.0.output.dense.bias"
    with pytest.raises(CheckpointError, match="two spellings"):
        build().load_state_dict(published | {respell(name): published[name]}, strict=False)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_tokenizer_files(tmp_path, vq_file, tokenizer, suffix):
    path = tmp_path / f"vqgan{suffix}"
    if suffix == ".bin":
        shutil.copy(vq_file, path)
    else:
        save_file(tokenizer.state_dict(), path)
    model = build(do_recon=True, vq_model=str(path))
    with path.open("r+b") as file:  # the model must not live in the file's memory
        file.seek(path.stat().st_size // 4)
        file.write(bytes(path.stat().st_size // 2))
    assert isinstance(model.reconstruction_head, nn.Linear)
    assert_holds(model.tokenizer, tokenizer.state_dict())
    image = images(1, 32, 32, 1)
    assert torch.equal(model.tokenizer.encode(image), tokenizer.encode(image))


def test_tokenizer_file_with_a_tensor_missing(tmp_path, tokenizer):
    state = dict(tokenizer.state_dict())
    state.pop("quantize.embedding.weight")
    path = tmp_path / "short.bin"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight"):
        build(do_recon=True, vq_model=path)


@pytest.mark.parametrize("layout", ["safetensors", "pickle", "trainer"])
def test_model_checkpoint_path(tmp_path, published, layout):
    state = {f"model.{respell(name)}": value for name, value in published.items()}
    path = tmp_path / ("model.safetensors" if layout == "safetensors" else "model.ckpt")
    if layout == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if layout == "pickle" else {"state_dict": state, "epoch": 3}, path)
    assert_holds(build(model_checkpoint_path=path), published)


def test_model_checkpoint_path_without_a_teacher_starts_one(tmp_path, published):
    path = tmp_path / "model.safetensors"
    save_file(published, path)
    model = build(do_clustering=True, momentum_teacher=True, model_checkpoint_path=path)
    for name in ("embeddings.cls_token", "encoder.layer.1.output.dense.weight"):
        teacher = model.teacher_encoder.get_parameter(name)
        assert torch.equal(teacher, published[f"encoder.{name}"])
    assert torch.equal(model.teacher_sparse_tokens, published["sparse_tokens"])


def test_model_checkpoint_path_wants_every_tensor_of_the_build(tmp_path, published):
    path = tmp_path / "model.safetensors"
    state = {name: value for name, value in published.items() if name != "sparse_proj.bias"}
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"sparse_proj\.bias"):
        build(model_checkpoint_path=path)
    save_file(published | {"encoder.stranger": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"encoder\.stranger"):
        build(model_checkpoint_path=path)


class Payload:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def test_model_checkpoint_path_runs_no_pickle_code(tmp_path, published, capfd):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": dict(published), "extra": Payload()}, path)
    with pytest.raises(CheckpointError):
        build(model_checkpoint_path=path)
    assert "code from a pickle ran" not in capfd.readouterr().out


def test_geometry_by_name_mapping_and_object(published):
    by_name = STELLARModel(4, do_recon=False, do_clustering=False, vit_pretrained=TINY)
    fields = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "patch_size": 16,
        "image_size": 64,
    }
    by_mapping = STELLARModel(4, do_recon=False, do_clustering=False, vit_pretrained=fields)
    assert by_mapping.config == by_name.config
    with torch.device("meta"):
        default = STELLARModel(4, do_recon=False, do_clustering=False)
        large = STELLARModel(
            4, do_recon=False, do_clustering=False, vit_pretrained="facebook/vit-mae-large"
        )
    assert default.config.backbone == BackboneConfig(768, 12, 12, 3072, 16)
    assert large.config.backbone.hidden_size == 1024
    by_config = STELLARModel(4, do_recon=False, do_clustering=False, vit_config=fields)
    assert by_config.config == by_name.config
    with pytest.raises(ValueError, match="one of vit_pretrained and vit_config"):
        STELLARModel(4, vit_pretrained=TINY, vit_config=fields)


VIT = {"model_type": "vit_mae", **asdict(TINY), "hidden_act": "gelu", "layer_norm_eps": 1e-12}


def write_vit(folder, state, suffix=".safetensors", **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VIT | config))
    if suffix == ".safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("spell", [str, respell], ids=["published", "renamed"])
@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_vit_of_a_folder_fills_the_encoder(tmp_path, published, suffix, prefix, spell):
    own = {
        prefix + spell(name).removeprefix("encoder."): value
        for name, value in published.items()
        if name.startswith("encoder.") and ".pooler." not in name
    }
    folder = write_vit(tmp_path / "vit", own | {"decoder.mask_token": torch.zeros(3)}, suffix)
    model = build(vit_pretrained=folder, do_clustering=True, momentum_teacher=True)
    state = model.state_dict()
    for name, value in published.items():
        if name.startswith("encoder.") and ".pooler." not in name:
            assert torch.equal(state[name], value), name
            assert torch.equal(state[f"teacher_{name}"], value), name
    assert state["encoder.pooler.dense.weight"].std() > 0


def test_a_vit_that_does_not_fit_is_refused(tmp_path, published):
    own = {n.removeprefix("encoder."): v for n, v in published.items() if n.startswith("encoder.")}
    for number, (config, message) in enumerate(
        [
            ({"hidden_act": "relu"}, "this ViT has .'hidden_act': 'relu'"),
            ({"layer_norm_eps": 1e-6}, "this ViT has .'layer_norm_eps': 1e-06"),
            ({"model_type": "bert"}, "not the config.json of a ViT"),
            ({"num_hidden_layers": 3}, "missing: encoder.encoder.layer.2"),
            ({"patch_size": 0}, "patch_size must be a positive integer"),
        ]
    ):
        folder = write_vit(tmp_path / str(number), own, **config)
        with pytest.raises(CheckpointError, match=message):
            build(vit_pretrained=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match=r"config\.json: there is no such file"):
        build(vit_pretrained=tmp_path / "empty")


def test_a_backbone_that_cannot_be_downloaded_is_never_random_in_silence(monkeypatch, published):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="someone/vit"):
        build(vit_pretrained="someone/vit")
    monkeypatch.setitem(backbone.BACKBONES, "facebook/vit-mae-base", TINY)
    with pytest.warns(RuntimeWarning, match="random weights until a checkpoint is loaded"):
        model = build(vit_pretrained="facebook/vit-mae-base")
    model.load_state_dict(published, strict=False)
    assert_holds(model, published)


def test_parameters_are_in_the_published_order():
    """Optimisers number them by it."""
    model = build(do_recon=True, do_clustering=True, momentum_teacher=True, num_clusters=8)
    names = [name for name, _ in model.named_parameters()]
    block = [name for name in names if name.startswith("encoder.encoder.layer.0.")]
    parts = [name.removeprefix("encoder.encoder.layer.0.") for name in block]
    assert [part for part in parts if part.endswith("weight")] == [
        *(f"attention.attention.{name}.weight" for name in ("query", "key", "value")),
        "attention.output.dense.weight",
        "intermediate.dense.weight",
        "output.dense.weight",
        "layernorm_before.weight",
        "layernorm_after.weight",
    ]
    assert list(dict.fromkeys(name.partition(".")[0] for name in names)) == [
        "sparse_tokens",
        "teacher_sparse_tokens",
        "encoder",
        "decoder",
        "teacher_encoder",
        "dense_proj",
        "sparse_proj",
        "decoder_proj",
        "reconstruction_head",
        "clustering_head",
        "cls_cluster_head",
        "teacher_head",
        "teacher_cls_head",
    ]
    assert [name for name in names if name.startswith("clustering_head.")] == [
        "clustering_head.layer.weight",
        *(f"clustering_head.predictor.layers.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")),
    ]
