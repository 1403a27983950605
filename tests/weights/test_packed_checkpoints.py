"""Packed weights that were tampered with: one CheckpointError that names what, and no engine."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG, CPU, edit_packed, join, save_packed, split

import stellar_fast
from stellar_fast.config import BACKBONES, ModelConfig
from stellar_fast.errors import CheckpointError
from stellar_fast.weights import saving
from stellar_fast.weights.packed import Fp8Block, map_nodes

QKV = "encoder.blocks.1.qkv"


@pytest.fixture
def file(tmp_path):
    return save_packed(tmp_path, "fp8", decoder=True)


def change(file, edit) -> None:
    """Changes the tensors of a file and keeps its metadata."""
    metadata = split(file)[0]["__metadata__"]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata)


def refused(file, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        saving.read(file, CONFIG, CPU)
    for part in (str(file), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200 + len(str(file))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("decoder", [False, True])
def test_an_honest_file_is_read_whole(tmp_path, precision, decoder):
    path = save_packed(tmp_path, precision, decoder=decoder)
    encode, decode = saving.read(path, CONFIG, CPU)
    assert (decode is not None) == decoder
    assert isinstance(encode.blocks[1], Fp8Block) == (precision == "fp8")
    found = {}
    saving._flatten(encode, "encoder", found)
    saving._flatten(decode, "decoder", found)
    stored = load_file(path)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_an_engine_does_not_change_with_the_file_it_came_from(tmp_path):
    path = save_packed(tmp_path, "fp32")
    encode, _ = saving.read(path, CONFIG, CPU)
    before = []
    map_nodes(encode, torch.Tensor, lambda tensor: before.append(tensor.clone()))
    with path.open("r+b") as opened:
        opened.write(b"\xff" * path.stat().st_size)
    after = []
    map_nodes(encode, torch.Tensor, after.append)
    assert all(map(torch.equal, before, after))


def nodes(packed: dict) -> dict:
    return packed["structure"]["encoder"]["fields"]


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda p: p.update(precision="int3"), ["names no precision"]),
        (lambda p: p.update(precision=["fp32"]), ["names no precision"]),
        (lambda p: p.pop("precision"), ["names no precision"]),
        (lambda p: p.update(precision="fp32"), ["unknown: ", ".scale"]),
        (lambda p: p.update(format=[[1]]), ["saved in format ?"]),
        (lambda p: p.pop("structure"), ["has no structure"]),
        (lambda p: p.update(structure=[]), ["has no structure"]),
        (lambda p: p["structure"].update(other=1), ["has no structure"]),
        (lambda p: p["structure"].update(encoder=None), ["does not describe encoder, a Encoder"]),
        (lambda p: p["structure"].update(decoder=None), ["does not describe decoder, a Decoder"]),
        (lambda p: p["structure"]["encoder"].update(kind="Path"), ["does not describe encoder"]),
        (lambda p: p["structure"]["encoder"].update(kind=["x"]), ["does not describe encoder"]),
        (lambda p: p["structure"]["encoder"].update(extra=1), ["does not describe encoder"]),
        (lambda p: nodes(p).update(extra={"tensor": "encoder.patch"}), ["describe encoder, a"]),
        (lambda p: nodes(p).pop("norm"), ["does not describe encoder, a"]),
        (lambda p: nodes(p)["norm"].update(kind="Linear"), ["does not describe encoder.norm"]),
        (lambda p: nodes(p)["norm"].update(kind="__builtins__"), ["describe encoder.norm, a Norm"]),
        (lambda p: nodes(p)["norm"].update(kind="map_nodes"), ["describe encoder.norm, a Norm"]),
        (lambda p: nodes(p)["blocks"].pop(), ["does not describe encoder.blocks"]),
        (lambda p: nodes(p)["blocks"].append(nodes(p)["blocks"][0]), ["describe encoder.blocks"]),
        (lambda p: nodes(p).update(patch={"tensor": "encoder.patch_uint8"}), ["encoder.patch"]),
        (lambda p: nodes(p).update(patch=3), ["does not describe encoder.patch"]),
        *[
            (
                lambda p, scale=scale: nodes(p)["blocks"][1]["fields"].update(hidden_scale=scale),
                ["encoder.blocks.1.hidden_scale, a float"],
            )
            for scale in (0.0, -1.0, 1, True, None, "1", [1.0])
        ],
    ],
)
def test_a_description_of_something_else(file, edit, parts):
    edit_packed(file, edit)
    with pytest.raises(CheckpointError) as caught:
        saving.read(file, CONFIG, CPU)
    for part in (str(file), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "NaN", '{"format": 1, "format": 1}'),
        '{"format": 1, "precision": "fp8", "structure": {"encoder": NaN, "decoder": null}}',
        "[" * 100_000,
        '{"a":' * 50_000,
    ],
)
def test_a_description_that_is_no_json(file, text):
    header, values = split(file)
    header["__metadata__"][saving.METADATA] = text
    join(file, json.dumps(header), values)
    with pytest.raises(CheckpointError, match="no JSON object"):
        saving.read(file, CONFIG, CPU)
    with pytest.raises(CheckpointError, match="no JSON object"):
        stellar_fast.load("tiny", repo=file.parent, device="cpu")


def test_static_scales_that_json_makes_infinite(file):
    header, values = split(file)
    text = header["__metadata__"][saving.METADATA]
    packed = json.loads(text)
    scale = nodes(packed)["blocks"][1]["fields"]["attended_scale"]
    header["__metadata__"][saving.METADATA] = text.replace(repr(scale), "1e999")
    join(file, json.dumps(header), values)
    refused(file, "encoder.blocks.1.attended_scale")


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        # Kernels read a scale for each channel of the output: fewer are a read out of bounds.
        (lambda t: t.update({f"{QKV}.scale": torch.ones(1)}), [f"{QKV}.scale is", "(96,)"]),
        (lambda t: t.update({f"{QKV}.scale": torch.ones(96, 1)}), [f"{QKV}.scale is"]),
        (lambda t: t.update({f"{QKV}.scale": torch.ones(96).half()}), ["float16 (96,) instead"]),
        (lambda t: t.update({f"{QKV}.bias": t[f"{QKV}.bias"][:5]}), ["(5,) instead of"]),
        (lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].T.contiguous()}), ["(32, 96)"]),
        (lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].float()}), ["float32 (96, 32)"]),
        (lambda t: t[f"{QKV}.scale"][3:4].fill_(0), ["scales that are not positive"]),
        (lambda t: t[f"{QKV}.scale"][3:4].fill_(-1), ["scales that are not positive"]),
        (lambda t: t[f"{QKV}.scale"][3:4].fill_(float("inf")), [f"{QKV}.scale holds NaN"]),
        (lambda t: t["encoder.norm.bias"][0:1].fill_(float("nan")), ["encoder.norm.bias holds"]),
        (lambda t: t["decoder.fourier"][0, 0:1].fill_(float("nan")), ["decoder.fourier holds"]),
        (
            # The pattern of e4m3 for NaN.
            lambda t: t[f"{QKV}.weight"].view(torch.uint8)[0, 0:1].fill_(0x7F),
            [f"{QKV}.weight holds NaN"],
        ),
        (lambda t: t.pop(f"{QKV}.scale"), [f"missing: {QKV}.scale"]),
        (lambda t: t.pop("encoder.patch"), ["missing: encoder.patch"]),
        (lambda t: t.update(extra=torch.ones(1)), ["unknown: extra"]),
        (lambda t: t.update({"x\x1b[2J\n" * 999: torch.ones(1)}), ["unknown: 'x\\x1b[2J"]),
        (lambda t: t.update({"decoder.vqgan.codebook": torch.ones(1)}), ["decoder.vqgan"]),
        (lambda t: [t.pop(name) for name in list(t) if "decoder" in name], ["describe decoder"]),
        (lambda t: t.update({"encoder.table.positions": torch.ones(2, 2, 32)}), ["(2, 2, 32)"]),
    ],
)
def test_tensors_of_another_kind(file, edit, parts):
    change(file, edit)
    refused(file, *parts)


@pytest.mark.parametrize(
    ("precision", "claimed"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "fp32")]
)
def test_a_precision_that_is_not_its_own(tmp_path, precision, claimed):
    path = save_packed(tmp_path, precision)
    edit_packed(path, lambda packed: packed.update(precision=claimed))
    refused(path, "encoder.patch is torch.")


def test_another_models_weights_are_refused_by_their_shapes(file):
    other = ModelConfig("tiny", BACKBONES["facebook/vit-mae-base"])
    with pytest.raises(CheckpointError, match=r"missing: .*fc1"):
        saving.read(file, other, CPU)


def test_no_engine_is_made_of_such_a_file(tmp_path):
    path = save_packed(tmp_path, "fp32")
    assert stellar_fast.load("tiny", repo=tmp_path, device="cpu").precision == "fp32"
    change(path, lambda t: t.update({f"{QKV}.bias": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=f"{QKV}.bias is"):
        stellar_fast.load("tiny", repo=tmp_path, device="cpu")
