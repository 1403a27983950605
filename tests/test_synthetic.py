"""Synthetic weights: repeatable, independent of what else is asked for, and of sane magnitude."""

import torch

from stellar_fast.config import MODELS
from stellar_fast.names import encode_shapes, vqgan_decoder_shapes
from stellar_fast.synthetic import synthetic_state

SHAPES = encode_shapes(MODELS["stellar-b16"])


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
