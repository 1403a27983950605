"""Engines written to disk and loaded back: the same bits, and clear errors for what is not so."""

import json

import pytest
import torch
from checkpoints import write_checkpoint, write_vqgan
from engines import SMALL, image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stellar_fast
from stellar_fast.errors import CheckpointError, StellarError
from stellar_fast.weights import saving
from stellar_fast.weights.checkpoint import read_state
from stellar_fast.weights.pack import pack_encoder
from stellar_fast.weights.packed import Fp8Block
from stellar_fast.weights.quantize import quantize_block


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    geometry = {"backbone": SMALL, "num_sparse_tokens": 8, "num_decoder_layers": 1}
    write_checkpoint(folder, "small", **geometry)
    write_checkpoint(folder, "pixel", pixel_head=True, **geometry)
    write_vqgan(folder / "vq.safetensors", 7)
    return folder


def load(folder, name="small", **keywords):
    return stellar_fast.load(name, repo=folder, device="cpu", **keywords)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("small", "fp32"), ("small", "bf16"), ("pixel", "fp16")),
        # Convolutions in fp16 take a CPU 20 times longer.
        pytest.param("small", "fp16", marks=pytest.mark.slow),
    ],
)
def test_an_engine_comes_back_bit_for_bit(source, tmp_path, name, precision):
    vq_model = source / "vq.safetensors" if name == "small" else None
    keywords = {"purpose": "reconstruct", "precision": precision}
    engine = load(source, name, vq_model=vq_model, **keywords)
    engine.save(tmp_path / "saved")
    again = load(tmp_path / "saved", name, **keywords)
    assert again.config.backbone == engine.config.backbone
    assert again.weights.endswith(f"{name}-{precision}.safetensors")
    x = image(2, 32, 32)
    features, expected = again.encode(x), engine.encode(x)
    for key in expected:
        assert torch.equal(features[key], expected[key])
    pixels, wanted = again.reconstruct(expected), engine.reconstruct(expected)
    for key in wanted:
        assert torch.equal(pixels[key], wanted[key])
    # What was saved encodes as well as ever after.
    assert torch.equal(engine.encode(x)["cls"], expected["cls"])


def test_the_saved_precision_is_the_one_that_auto_takes(source, tmp_path):
    load(source, precision="fp16").save(tmp_path)
    assert load(tmp_path).precision == "fp16"
    with pytest.raises(ValueError, match="packed for precision='fp16', got precision='fp32'"):
        load(tmp_path, precision="fp32")


def test_an_engine_that_only_encodes_does_not_reconstruct(source, tmp_path):
    load(source, precision="fp32").save(tmp_path)
    with pytest.raises(CheckpointError, match="only encodes"):
        load(tmp_path, purpose="reconstruct")


def test_fp8_blocks_and_their_scales_come_back(source, tmp_path):
    engine = load(source, precision="fp32")
    state = read_state(source / "small.safetensors")
    packed = pack_encoder(
        state, engine.config, torch.float16, torch.device("cpu"), quantize=quantize_block
    )
    saving.save(tmp_path, engine.config, "fp8", packed, None)
    file = tmp_path / "small-fp8.safetensors"
    assert saving.saved_precision(file) == "fp8"
    again, decoder = saving.read(file, engine.config, torch.device("cpu"))
    assert decoder is None
    ours, theirs = packed.blocks[1], again.blocks[1]
    assert isinstance(theirs, Fp8Block)
    assert (ours.attended_scale, ours.hidden_scale) == (theirs.attended_scale, theirs.hidden_scale)
    assert torch.equal(ours.qkv.weight.view(torch.uint8), theirs.qkv.weight.view(torch.uint8))
    assert torch.equal(ours.fc2.scale, theirs.fc2.scale)


def test_a_view_does_not_drag_its_base_along(source, tmp_path):
    engine = load(source, precision="fp32")
    engine.save(tmp_path)
    tensors = load_file(tmp_path / "small-fp32.safetensors")
    assert tensors["encoder.last.query.weight"].shape == (64, 64)
    assert (tmp_path / "small-fp32.safetensors").stat().st_size < 1.1 * sum(
        tensor.nbytes for tensor in tensors.values()
    )


def test_another_format_is_refused_by_number(source, tmp_path):
    load(source, precision="fp32").save(tmp_path)
    file = tmp_path / "small-fp32.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()[saving.METADATA])
    header["format"] = 99
    save_file(load_file(file), file, metadata={saving.METADATA: json.dumps(header)})
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load(tmp_path)


def test_a_tensor_that_is_gone_is_named(source, tmp_path):
    load(source, precision="fp32").save(tmp_path)
    file = tmp_path / "small-fp32.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["encoder.blocks.1.fc1.bias"]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"damaged.*blocks\.1\.fc1\.bias"):
        load(tmp_path)


def test_models_that_are_there_are_never_touched(source, tmp_path):
    load(source, precision="fp32").save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StellarError, match="holds models already"):
        load(source, "pixel", precision="fp16").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StellarError, match="cannot be written"):
        load(source, precision="fp32").save(tmp_path / "file")
    (tmp_path / "taken" / "small-fp32.safetensors").mkdir(parents=True)
    with pytest.raises(StellarError, match="cannot be written"):
        load(source, precision="fp32").save(tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["small-fp32.safetensors"]
