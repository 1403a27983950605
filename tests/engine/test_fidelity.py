"""`Engine.fidelity`: what it says of features that are right, wrong, and in between."""

import pytest
import torch
from budgets import TENSOR
from checkpoints import relative_error, write_checkpoint
from engines import SMALL, image, small_engine

import stellar_fast
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.engine.fidelity import compare


@pytest.fixture(scope="module")
def features():
    return small_engine().encode(image(5, 64, 64))


def test_the_same_features_agree(features):
    found = compare([(features, features)], "bf16", "torch")
    assert list(found.outputs) == list(OUTPUTS) and found.images == 5
    for agreement in found.outputs.values():
        assert agreement.error == 0
        assert agreement.least_cosine == pytest.approx(1) == agreement.cosine
    assert found.strongest == 1 and found.neighbours == {"cls": 1, "sparse": 1}


def test_each_number_is_of_its_own_output(features):
    other = {name: tensor.clone() for name, tensor in features.items()}
    other["dense"] *= 1.5
    other["cls"][3] *= -1
    top = other["spatial"][0, 0].argmax()
    other["spatial"][0, 0, top] = 0
    found = compare([(other, features)], "int8", "openvino")
    assert found.outputs["dense"].error == pytest.approx(0.5)
    assert found.outputs["dense"].cosine == pytest.approx(1)
    assert found.outputs["cls"].least_cosine == pytest.approx(-1)
    assert found.outputs["cls"].cosine == pytest.approx(0.6)
    assert found.outputs["sparse"].error == 0
    patches = features["spatial"].shape[0] * features["spatial"].shape[1]
    assert found.strongest == pytest.approx(1 - 1 / patches)
    assert found.neighbours["sparse"] == 1


def test_batches_count_as_one(features):
    other = {name: tensor * 1.01 + 0.01 for name, tensor in features.items()}
    whole = compare([(other, features)], "bf16", "torch")
    halves = [slice(0, 2), slice(2, 5)]
    cut = [
        ({k: v[part] for k, v in other.items()}, {k: v[part] for k, v in features.items()})
        for part in halves
    ]
    assert str(compare(cut, "bf16", "torch")) == str(whole)


def test_nearest_images_are_compared():
    cls = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])[:, None]
    exact = {name: cls.clone() for name in OUTPUTS}
    moved = {name: value.clone() for name, value in exact.items()}
    moved["cls"][1] = torch.tensor([[0.1, 1.0]])  # its nearest was 0, and 0's nearest was it
    found = compare([(moved, exact)], "bf16", "torch")
    assert found.neighbours["cls"] < 1 and found.neighbours["sparse"] == 1
    few = {name: value[:2] for name, value in exact.items()}
    assert compare([(few, few)], "bf16", "torch").neighbours == {}


def test_an_engine_finds_its_own_float32(tmp_path):
    write_checkpoint(tmp_path, "small", backbone=SMALL, num_sparse_tokens=8)
    load = {"repo": tmp_path, "device": "cpu"}
    engine = stellar_fast.load("small", precision="bf16", max_batch=2, **load)
    exact = stellar_fast.load("small", precision="fp32", **load)
    x = image(5, 64, 64)
    found = engine.fidelity(x)
    assert (found.precision, found.backend, found.images) == ("bf16", engine.backend, 5)
    for name, tensor in engine.encode(x).items():
        error = relative_error(tensor, exact.encode(x)[name])
        assert found.outputs[name].error == pytest.approx(error, abs=TENSOR)
    assert engine.fidelity(x, reference=exact).strongest == found.strongest
    text = str(found)
    assert text.splitlines()[0].startswith("bf16 on ") and "strongest token" in text
    with pytest.raises(ValueError, match="at least one image"):
        engine.fidelity(x[:0])
    with pytest.raises(ValueError, match="give an fp32 one as reference"):
        small_engine().fidelity(x)


def test_the_reference_may_be_shown_what_was_intended():
    engine, x = small_engine(), image(4, 64, 64)
    changed = x.flip(-1)
    same = engine.fidelity(x, reference=engine, intended=x)
    assert all(found.error == 0 for found in same.outputs.values())
    found = engine.fidelity(changed, reference=engine, intended=x)
    right, wrong = engine.encode(x)["cls"], engine.encode(changed)["cls"]
    error = relative_error(wrong, right)
    assert found.outputs["cls"].error == pytest.approx(error, abs=TENSOR) and error > 0.01
    with pytest.raises(ValueError, match="4 images, but 3 intended ones"):
        engine.fidelity(x, reference=engine, intended=x[:3])
