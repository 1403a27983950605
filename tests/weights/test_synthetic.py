"""Synthetic weights: repeatable, independent of what else is asked for, and of sane magnitude."""

import pytest
import torch
from engines import SMALL_META, config_of

import stellar_fast
from stellar_fast import photos
from stellar_fast.images.presets import apply_preset
from stellar_fast.weights.names import encode_shapes, vqgan_decoder_shapes
from stellar_fast.weights.synthetic import synthetic_state

SHAPES = encode_shapes(config_of(SMALL_META))


def test_a_seed_gives_the_same_tensors_whatever_the_subset():
    whole = synthetic_state(SHAPES, 3)
    names = list(SHAPES)[::17]
    part = synthetic_state({name: SHAPES[name] for name in reversed(names)}, 3)
    assert all(torch.equal(part[name], whole[name]) for name in names)
    other = synthetic_state({name: SHAPES[name] for name in names}, 4)
    assert not any(torch.equal(other[name], whole[name]) for name in names)


def test_shapes_dtypes_and_magnitudes():
    state = synthetic_state(SHAPES | vqgan_decoder_shapes(), 0)
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert 0 < tensor.std() < 1.1, name
    assert torch.equal(state["dense_proj.weight"], state["sparse_proj.weight"])
    assert not torch.equal(state["dense_proj.bias"], state["sparse_proj.bias"])
    assert abs(state["encoder.layernorm.weight"].mean() - 1) < 0.05


@pytest.mark.numerical
def test_spatial_maps_of_a_photograph_are_peaked_and_have_regions():
    photograph = photos.draw(next(iter(photos.SCENES)), 300, 300, 1)
    engine = stellar_fast.load("stellar-b16", weights="synthetic", device="cpu", precision="fp32")
    out = engine.encode(apply_preset(photograph, "card")[None])
    assert out["spatial"].amax(-1).mean() > 4 / 16
    owner = out["spatial"][0].argmax(-1).view(14, 14)
    assert owner.unique().numel() >= 4
    alike = [owner[1:] == owner[:-1], owner[:, 1:] == owner[:, :-1]]
    assert torch.cat([pairs.flatten() for pairs in alike]).float().mean() > 1 / 3
    tokens = torch.nn.functional.normalize(out["sparse"][0], dim=-1)
    assert (tokens @ tokens.T).fill_diagonal_(0).mean() < 0.6  # blocks leave them different
