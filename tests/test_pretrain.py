"""The training forward against the published losses, gradients and teacher."""

import functools
from typing import Any

import pytest
import torch
from checkpoints import filled, golden, images, relative_error, synthetic
from stellar_fast.reference.model import STELLARModel
from stellar_fast.reference.pretrain import reconstruction_predictions, training_loss
from stellar_fast.reference.vqgan import VQGAN
from torch import Tensor

from stellar_fast.names import vqgan_shapes

LOSS_TOLERANCE = 1e-4  # golden/README.md, relative
GRADIENT_TOLERANCE = 1e-3
TEACHER_TOLERANCE = 1e-6  # one multiply-add in float32
GOLDENS = [
    "pretrain-tiny16",
    "pretrain-tiny16-pixel-nokoleo-nomatch",
    "pretrain-tiny16-teacher",
]


@functools.cache
def tokenizer(seed: int) -> VQGAN:
    with torch.device("meta"):
        model = VQGAN()
    model.load_state_dict(synthetic(vqgan_shapes(), seed), assign=True)
    return model.requires_grad_(False)


def golden_model(meta: dict[str, Any]) -> STELLARModel:
    vq_seed = meta["vq_weights_seed"]
    model = STELLARModel(
        vq_model=None if vq_seed is None else tokenizer(vq_seed),
        vit_pretrained=meta["backbone"],
        **meta["arguments"],
    )
    return filled(model, meta["weights_seed"]).train()


def golden_inputs(meta: dict[str, Any]) -> dict[str, Tensor]:
    batch = meta["batch"]
    count = {
        "global": meta["arguments"]["num_masks"],
        "local": meta["arguments"]["num_local_crops"],
    }
    views = images(batch * count["global"], 224, 224, meta["global_views_seed"])
    crops = images(batch * count["local"], 96, 96, meta["local_views_seed"])
    return {
        "image": images(batch, 224, 224, meta["image_seed"]),
        "labels": torch.arange(batch),
        "global_views": views.unflatten(0, (batch, count["global"])),
        "local_views": crops.unflatten(0, (batch, count["local"])),
    }


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name):
    expected, meta = golden(name)
    model, inputs = golden_model(meta), golden_inputs(meta)
    predictions = model(inputs)["predictions"]

    losses = {key for key, value in predictions.items() if value.requires_grad and not value.ndim}
    assert losses == set(meta["order_of_losses"])
    total = training_loss(predictions)
    for key in meta["order_of_losses"]:
        error = relative_error(predictions[key].reshape(1), expected[f"loss.{key}"])
        assert error < LOSS_TOLERANCE, key
    assert relative_error(total.reshape(1), expected["total"]) < LOSS_TOLERANCE

    total.backward()
    gradients = {
        key: value.grad for key, value in model.named_parameters() if value.grad is not None
    }
    norms = {key.removeprefix("gradnorm.") for key in expected if key.startswith("gradnorm.")}
    assert gradients.keys() == norms  # none for tokenizer, teacher and what is never used
    for key in norms:
        if key.endswith("attention.key.bias"):
            continue  # softmax does not see it: the true gradient is 0
        error = relative_error(gradients[key].norm().reshape(1), expected[f"gradnorm.{key}"])
        assert error < GRADIENT_TOLERANCE, key
    state = model.state_dict()
    for key, value in expected.items():
        kind, _, parameter = key.partition(".")
        if kind == "grad":
            assert relative_error(gradients[parameter], value) < GRADIENT_TOLERANCE, key
        elif kind == "after":
            assert relative_error(state[parameter], value) < TEACHER_TOLERANCE, key


@pytest.mark.parametrize("name", ["reconstruct-tiny16", "reconstruct-tiny14"])
def test_code_loss_golden(name):
    expected, meta = golden(name)
    model = STELLARModel(
        meta["num_sparse_tokens"],
        num_decoder_layers=meta["num_decoder_layers"],
        vq_model=tokenizer(meta["vq_weights_seed"]),
        do_clustering=False,
        vit_pretrained=meta["backbone"],
    )
    filled(model, meta["weights_seed"])
    image = images(meta["batch"], 224, 224, meta["image_seed"])
    with torch.no_grad():
        found = reconstruction_predictions(model, model.encode(image)["lowrank"], image)
    assert relative_error(found["VQ-CE"].reshape(1), expected["vq_ce"]) < LOSS_TOLERANCE
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    assert relative_error(found["x_hat"][:, ::stride], expected["logits"]) < 2e-5
    assert found["x_original"].shape == expected["reconstruction"].shape
    if meta["backbone"]["patch_size"] == 16:
        assert found["x_original"] is image
