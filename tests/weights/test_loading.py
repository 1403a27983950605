"""`load` and `load_stellar` on folders in the published layout, whatever their geometry."""

import json
import shutil

import pytest
import torch
from checkpoints import images, relative_error, write_checkpoint, write_vqgan
from pretraining import unchanged
from safetensors.torch import load_file, save_file

import stellar_fast
from stellar_fast import CheckpointError, DownloadError, Engine
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.reference import STELLARModel

GEOMETRIES = {
    "narrow": ({"width": (64, 4), "layers": 2, "mlp": 160, "patch": 16}, 8, 0.06),
    "one-layer": ({"width": (96, 2), "layers": 1, "mlp": 200, "patch": 16}, 12, 0.06),
    "patch-14": ({"width": (160, 2), "layers": 3, "mlp": 320, "patch": 14}, 24, 0.1),
    "patch-8": ({"width": (72, 3), "layers": 2, "mlp": 100, "patch": 8, "size": 64}, 16, None),
    "heads-of-80": ({"width": (320, 4), "layers": 2, "mlp": 1280, "patch": 14}, 16, 0.06),
}
SIZES = [(224, 224), (64, 320), (177, 98)]


def backbone(width, layers, mlp, patch, size=224) -> dict[str, int]:
    return {
        "hidden_size": width[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width[1],
        "intermediate_size": mlp,
        "patch_size": patch,
        "image_size": size,
    }


SMALL = backbone(**GEOMETRIES["narrow"][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of every geometry and variant, and the tokenizer in both formats."""
    path = tmp_path_factory.mktemp("published")
    for name, (geometry, tokens, temperature) in GEOMETRIES.items():
        write_checkpoint(
            path,
            name,
            backbone=backbone(**geometry),
            num_sparse_tokens=tokens,
            num_decoder_layers=1,
            spatial_temp=temperature,
            seed=11,
        )
    variants = {
        "renamed": {"spelling": "renamed"},
        "prefixed": {"prefix": "model.", "spelling": "renamed"},
        "pixels": {"pixel_head": True},
        "teacher": {"teacher": True},
    }
    for name, variant in variants.items():
        write_checkpoint(
            path,
            name,
            backbone=SMALL,
            num_sparse_tokens=8,
            num_decoder_layers=1,
            seed=11,
            **variant,
        )
    write_vqgan(path / "vq.safetensors", 7)
    torch.save(load_file(path / "vq.safetensors"), path / "vq.bin")
    return path


def reference(folder, name: str, **arguments) -> STELLARModel:
    """The reference module on a checkpoint of `folder`, read by `load_state_dict` alone."""
    entry = json.loads((folder / "config.json").read_text())["models"][name]
    model = STELLARModel(
        num_sparse_tokens=entry["num_sparse_tokens"],
        num_decoder_layers=entry["num_decoder_layers"],
        spatial_temp=entry["spatial_temp"],
        vit_pretrained=entry["backbone"],
        **{"do_recon": False, "do_clustering": False, "vq_model": None} | arguments,
    )
    missing, _ = model.load_state_dict(load_file(folder / entry["weights"]), strict=False)
    assert all(name.startswith("tokenizer.") for name in missing)
    return model.eval()


def assert_agree(ours: dict, theirs: dict, tokens: int) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        if name in ("spatial", "peak_dist"):
            assert relative_error(ours[name] - 1 / tokens, theirs[name] - 1 / tokens) < 1e-4
        else:
            assert relative_error(ours[name], theirs[name]) < 2e-5, name


@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_geometry_encodes_as_the_reference(folder, name):
    model = reference(folder, name)
    engine = stellar_fast.load(name, repo=folder, device="cpu", precision="fp32")
    drop_in = stellar_fast.load_stellar(name, repo=folder, device="cpu").eval()
    assert drop_in.precision == "fp32"
    for size in SIZES:
        x = images(2, *size, seed=5)
        with torch.no_grad():
            expected = model.encode(x)
            found = drop_in.encode(x)
        tokens = GEOMETRIES[name][1]
        assert_agree(engine.encode(x, outputs=expected), expected, tokens)
        assert_agree(found, expected, tokens)


@pytest.mark.parametrize("name", ["renamed", "prefixed", "pixels", "teacher"])
def test_spellings_prefix_and_extra_tensors_change_nothing(folder, name):
    x = images(1, 96, 128, seed=2)
    expected = stellar_fast.load("narrow", repo=folder, device="cpu").encode(x)
    found = stellar_fast.load(name, repo=folder, device="cpu").encode(x)
    for key in OUTPUTS:
        assert torch.equal(found[key], expected[key])


@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        ("narrow", "vq.bin", (64, 64)),
        ("patch-14", "vq.safetensors", (70, 70)),
        pytest.param("narrow", "vq.safetensors", (224, 224), marks=pytest.mark.slow),
        pytest.param("patch-14", "vq.bin", (224, 224), marks=pytest.mark.slow),
    ],
)
def test_reconstruct_as_the_reference(folder, name, file, size):
    model = reference(folder, name, do_recon=True, vq_model=folder / file)
    engine = stellar_fast.load_stellar(
        name, "reconstruct", folder / file, repo=folder, device="cpu"
    )
    x = images(1, *size, seed=4)
    with torch.no_grad():
        expected = model.reconstruct(model.encode(x))
        found = engine.reconstruct(engine.encode(x))
    assert relative_error(found["logits"], expected["logits"]) < 2e-5
    assert torch.equal(found["tokens"], expected["tokens"])
    assert relative_error(found["reconstruction"], expected["reconstruction"]) < 2e-5


def test_the_pixel_head_is_found_by_its_shape(folder):
    model = reference(folder, "pixels", do_recon=True)
    engine = stellar_fast.load_stellar("pixels", "reconstruct", repo=folder, device="cpu")
    x = images(2, 128, 128, seed=4)
    with torch.no_grad():
        expected = model.reconstruct(model.encode(x))["reconstruction"]
        found = engine.reconstruct(engine.encode(x))["reconstruction"]
    assert found.shape == (2, 3, 128, 128)
    assert relative_error(found, expected) < 2e-5
    with pytest.raises(CheckpointError, match="makes pixels itself"):
        stellar_fast.load(
            "pixels", purpose="reconstruct", vq_model=folder / "vq.bin", repo=folder, device="cpu"
        )


PLAIN = {"masking_ratio": 0.0, "focal_mode": None, "color_augmentation": False}


@pytest.mark.parametrize("vq", [True, False])
def test_pretrain_gives_the_reference_module_to_train(folder, vq):
    name, vq_model = ("narrow", folder / "vq.bin") if vq else ("pixels", None)
    few = {"num_masks": 2, "num_local_crops": 2}
    model = stellar_fast.load_stellar(
        name, "pretrain", vq_model, repo=folder, device="cpu", **PLAIN | few
    )
    by_hand = reference(
        folder, name, do_recon=True, do_clustering=True, vq_model=vq_model, **PLAIN | few
    ).train()
    model.augment = by_hand.augment = unchanged
    assert isinstance(model, STELLARModel)
    assert model.training
    batch = {
        "image": images(2, 64, 64, 1),
        "labels": torch.zeros(2, dtype=torch.int64),
        "global_views": images(4, 96, 96, 2).unflatten(0, (2, 2)),
        "local_views": images(4, 48, 48, 3).unflatten(0, (2, 2)),
    }
    found, expected = model(batch)["predictions"], by_hand(batch)["predictions"]
    losses = [key for key in expected if "loss" in key or key in ("VQ-CE", "MSE")]
    assert len(losses) >= 6
    for key in losses:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=0, msg=key)
    sum(found[key] for key in losses).backward()
    trained = {key for key, value in model.named_parameters() if value.grad is not None}
    assert any(key.startswith("encoder.") for key in trained)
    assert not any(key.startswith("tokenizer.") for key in trained)


def test_pretrain_takes_the_published_runs_arguments_and_a_teacher(folder):
    vq_model = folder / "vq.bin"
    model = stellar_fast.load_stellar("narrow", "pretrain", vq_model, repo=folder, device="cpu")
    assert (model.masking_ratio, model.num_masks, model.num_local_crops) == (0.75, 8, 8)
    assert not model.momentum_teacher
    fresh = stellar_fast.load_stellar(
        "narrow", "pretrain", vq_model, repo=folder, device="cpu", momentum_teacher=True
    )
    assert torch.equal(fresh.teacher_sparse_tokens, fresh.sparse_tokens)
    stored = stellar_fast.load_stellar(
        "teacher", "pretrain", vq_model, repo=folder, device="cpu", momentum_teacher=True
    )
    assert not torch.equal(stored.teacher_sparse_tokens, stored.sparse_tokens)
    with pytest.raises(ValueError, match="needs vq_model"):
        stellar_fast.load_stellar("narrow", "pretrain", repo=folder, device="cpu")
    with pytest.raises(TypeError, match="'masking_ratio'"):
        stellar_fast.load_stellar("narrow", repo=folder, device="cpu", masking_ratio=0.5)
    with pytest.raises(TypeError, match="maskin_ratio"):
        stellar_fast.load_stellar(
            "narrow", "pretrain", vq_model, repo=folder, device="cpu", maskin_ratio=0.5
        )


@pytest.fixture
def broken(folder, tmp_path):
    """Writes a changed copy of the narrow checkpoint and returns its folder."""

    def change(edit) -> object:
        state = load_file(folder / "narrow.safetensors")
        edit(state)
        shutil.copy(folder / "config.json", tmp_path)
        save_file(state, tmp_path / "narrow.safetensors")
        return tmp_path

    return change


NAME = "encoder.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop(NAME), f"1 missing: {NAME}"),
        (lambda state: state.pop("sparse_tokens"), "1 missing: sparse_tokens"),
        (lambda state: state.update({NAME: state[NAME].T.contiguous()}), "of another shape"),
        (lambda state: state.update(extra=torch.ones(1)), "1 unknown: extra"),
        (lambda state: state[NAME].view(-1)[5:6].fill_(float("nan")), "NaN or infinity"),
        (
            lambda state: state.update({NAME.replace("dense", "dens"): state.pop(NAME)}),
            r"1 missing: .*1 unknown: ",
        ),
    ],
)
def test_a_wrong_tensor_is_named(broken, edit, message):
    repo = broken(edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        stellar_fast.load("narrow", repo=repo, device="cpu")
    assert "narrow.safetensors" in str(caught.value)


def test_what_encode_does_not_need_may_be_missing_or_there(broken):
    def edit(state):
        for name in [name for name in state if name.startswith(("decoder", "cluster", "cls_"))]:
            del state[name]
        state["tokenizer.encoder.conv_in.weight"] = torch.ones(3)

    repo = broken(edit)
    assert isinstance(stellar_fast.load("narrow", repo=repo, device="cpu"), Engine)
    with pytest.raises(CheckpointError, match="missing: decoder"):
        stellar_fast.load("narrow", purpose="reconstruct", repo=repo, device="cpu")


def test_half_precision_files_load(broken, folder):
    repo = broken(lambda state: state.update({k: v.half() for k, v in state.items()}))
    x = images(1, 64, 64, 0)
    half = stellar_fast.load("narrow", repo=repo, device="cpu").encode(x)
    full = stellar_fast.load("narrow", repo=folder, device="cpu").encode(x)
    assert 0 < relative_error(half["dense"], full["dense"]) < 1e-2


def test_an_engine_does_not_depend_on_its_file_any_more(broken):
    repo = broken(lambda state: None)
    engine = stellar_fast.load("narrow", repo=repo, device="cpu")
    x = images(1, 64, 64, 0)
    before = engine.encode(x)["dense"]
    size = (repo / "narrow.safetensors").stat().st_size
    with (repo / "narrow.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(engine.encode(x)["dense"], before)
    smaller = engine.encode(images(1, 96, 48, 0))
    assert smaller["dense"].isfinite().all()


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
def test_synthetic_weights_of_a_published_model(no_network):
    engine = stellar_fast.load("stellar-b8", weights="synthetic", device="cpu", precision="fp32")
    spatial = engine.encode(images(1, 64, 64, 0), outputs=("spatial",))["spatial"]
    assert spatial.max(-1).values.mean() > 2 / 8, "spatial maps are flat"


def test_synthetic_weights_say_what_they_are_and_are_the_same_every_time(folder, no_network):
    (folder / "narrow.safetensors").rename(folder / "away")
    try:
        first, second = (
            stellar_fast.load("narrow", repo=folder, weights="synthetic", device="cpu")
            for _ in range(2)
        )
    finally:
        (folder / "away").rename(folder / "narrow.safetensors")
    assert first.weights == "synthetic"
    assert "synthetic" in repr(first)
    x = images(1, 64, 64, 0)
    found = first.encode(x)
    for name, value in second.encode(x).items():
        assert torch.equal(found[name], value)
    assert found["spatial"].max(-1).values.mean() > 2 / 8, "spatial maps are flat"


def test_synthetic_weights_take_a_local_geometry_and_reconstruct(folder):
    engine = stellar_fast.load(
        "narrow", purpose="reconstruct", repo=folder, weights="synthetic", device="cpu"
    )
    out = engine.reconstruct(engine.encode(images(1, 64, 64, 0)))
    assert out["reconstruction"].shape == (1, 3, 64, 64)
    model = stellar_fast.load_stellar(
        "narrow", "pretrain", folder / "vq.bin", repo=folder, weights="synthetic", device="cpu"
    )
    assert model.sparse_tokens.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"purpose": "pretrain"}, ValueError, "load_stellar has 'pretrain'"),
        ({"purpose": "reconstruct"}, ValueError, "needs vq_model"),
        ({"purpose": "reconstruct", "vq_model": "gone.bin"}, DownloadError, r"gone\.bin"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known: auto, triton, openvino, torch"),
        ({"precision": "int4"}, ValueError, "'int4'; known: auto, fp32, bf16, fp16, fp8, int8"),
        ({"precision": "fp8"}, ValueError, "compute capability 8.9 or later; got cpu"),
        ({"weights": "random"}, ValueError, "'random'"),
        ({"device": "cuda:99"}, ValueError, "usable CUDA devices"),
        ({"device": "meta"}, ValueError, "'meta'"),
        ({"output_dtype": torch.int8}, ValueError, "int8"),
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_one_clear_error(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        stellar_fast.load("narrow", **{"repo": folder, "device": "cpu"} | arguments)


def test_synthetic_weights_never_take_another_geometry_in_silence(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    home = f"~/{folder.name}"
    engine = stellar_fast.load("narrow", repo=home, weights="synthetic", device="cpu")
    assert engine.config.backbone.hidden_size == 64
    with pytest.raises(DownloadError, match="no such folder"):
        stellar_fast.load("stellar-b16", repo="./absent/folder", weights="synthetic")
    with pytest.raises(ValueError, match="'other/repository' cannot be looked up"):
        stellar_fast.load("stellar-b16", repo="other/repository", weights="synthetic")


def test_an_unknown_model_lists_the_known(folder):
    with pytest.raises(ValueError, match="stellar-b16"):
        stellar_fast.load("stellar-b17", weights="synthetic")
    with pytest.raises(ValueError, match="narrow"):
        stellar_fast.load("stellar-b16", repo=folder)


def test_the_tokenizer_must_be_a_tokenizer(folder):
    with pytest.raises(CheckpointError, match=r"narrow\.safetensors.*missing: decoder\.conv_in"):
        stellar_fast.load(
            "narrow",
            purpose="reconstruct",
            vq_model=folder / "narrow.safetensors",
            repo=folder,
            device="cpu",
        )
