"""The training forward against the published losses, gradients and teacher."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budgets import GRADIENT, LOSS, TEACHER, TENSOR
from checkpoints import filled, golden, images, relative_error, synthetic
from goldens import golden_image
from pretraining import unchanged
from references import reference_of, vqgan_of
from torch import Tensor

from stellar_fast.reference import STELLARModel
from stellar_fast.reference.pretrain.losses import reconstruction_predictions, training_loss
from stellar_fast.reference.vqgan import VQGAN

pytestmark = pytest.mark.numerical
# Float64 too: a bound that the model itself does not meet is one of the rounding it had.
DTYPES = [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
GOLDENS = [
    "pretrain-tiny16",
    "pretrain-tiny16-pixel-nokoleo-nomatch",
    "pretrain-tiny16-teacher",
    "pretrain-tiny16-globalalign",
    "pretrain-tiny16-fewviews",
]


@functools.cache
def codes_of(image_seed: int, batch: int) -> Tensor:
    """The tokenizer's codes of a file's images, (batch, 196): the same in every dtype, since
    test_reference_reconstruct.py finds them decided."""
    return vqgan_of().encode(images(batch, 224, 224, image_seed))


def golden_model(meta: dict[str, Any], dtype: torch.dtype) -> STELLARModel:
    tokenizer = None
    if meta["vq_weights_seed"] is not None:
        with torch.device("meta"):
            tokenizer = VQGAN()
        codes = codes_of(meta["image_seed"], meta["batch"])
        tokenizer.encode = lambda images: codes
    with torch.device("meta"):
        model = STELLARModel(
            vq_model=tokenizer, vit_pretrained=meta["backbone"], **meta["arguments"]
        )
    filled(model, meta["weights_seed"]).to(dtype).train()
    model.augment = unchanged
    with torch.no_grad():
        for name, factor in meta.get("scale_after_fill", {}).items():
            model.get_parameter(name).mul_(factor)
    return model


def golden_inputs(meta: dict[str, Any]) -> dict[str, Tensor]:
    batch, arguments = meta["batch"], meta["arguments"]
    count = {
        "global": meta.get("num_global_views", arguments["num_masks"]),
        "local": meta.get("num_local_views", arguments["num_local_crops"]),
    }
    views = images(batch * count["global"], 224, 224, meta["global_views_seed"])
    crops = images(batch * count["local"], 96, 96, meta["local_views_seed"])
    return {
        "image": images(batch, 224, 224, meta["image_seed"]),
        "labels": torch.arange(batch),
        "global_views": views.unflatten(0, (batch, count["global"])),
        "local_views": crops.unflatten(0, (batch, count["local"])),
    }


def inputs_as(dtype: torch.dtype, meta: dict[str, Any]) -> dict[str, Tensor]:
    return {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in golden_inputs(meta).items()
    }


def assert_trains_as_published(
    model: STELLARModel, inputs: dict[str, Tensor], expected: dict[str, Tensor], meta: dict
) -> None:
    """A forward and its backward pass: every loss, the total, gradients, and the teacher after."""
    model.zero_grad()
    predictions = model(inputs)["predictions"]

    losses = {key for key, value in predictions.items() if value.requires_grad and not value.ndim}
    assert losses == set(meta["order_of_losses"])
    total = training_loss(predictions)
    for key in meta["order_of_losses"]:
        error = relative_error(predictions[key].reshape(1), expected[f"loss.{key}"])
        assert error < LOSS, key
    assert relative_error(total.reshape(1), expected["total"]) < LOSS

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
        assert error < GRADIENT, key
    state = model.state_dict()
    for key, value in expected.items():
        kind, _, parameter = key.partition(".")
        if kind == "grad":
            assert relative_error(gradients[parameter], value) < GRADIENT, key
        elif kind == "after":
            assert relative_error(state[parameter], value) < TEACHER, key
        elif kind == "afternorm":
            norm = state[parameter].norm().reshape(1)
            assert relative_error(norm, value) < TEACHER, key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, dtype):
    expected, meta = golden(name)
    assert_trains_as_published(golden_model(meta, dtype), inputs_as(dtype, meta), expected, meta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_momentum_schedule(dtype):
    """Training forwards move the teacher by a momentum that changes; one in eval mode does not."""
    expected, meta = golden("pretrain-tiny16-teacher-schedule")
    model, inputs = golden_model(meta, dtype), inputs_as(dtype, meta)
    assert "_step_counter" not in model.state_dict()
    student = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(("teacher_", "tokenizer."))
    }
    for number, forward in enumerate(meta["forwards"], 1):
        shapes = {name: tuple(value.shape) for name, value in student.items()}
        for name, value in synthetic(shapes, forward["student_weights_seed"]).items():
            student[name].copy_(value)
        before = {name: value.clone() for name, value in teacher_of(model).items()}
        model.train(forward["training"])
        prefix = f"forward{number}."
        found = {
            key.removeprefix(prefix): value
            for key, value in expected.items()
            if key.startswith(prefix)
        }
        assert_trains_as_published(model, inputs, found, meta)
        moved = [not torch.equal(value, before[name]) for name, value in teacher_of(model).items()]
        assert (all(moved) if forward["teacher_changed"] else not any(moved)) and moved
        assert int(model._step_counter) == found["step_counter"].item()
        assert model.teacher_momentum == pytest.approx(found["teacher_momentum"].item(), abs=1e-12)


def teacher_of(model: STELLARModel) -> dict[str, Tensor]:
    return {name: v for name, v in model.state_dict().items() if name.startswith("teacher_")}


@pytest.mark.parametrize("name", ["reconstruct-tiny16", "reconstruct-tiny14"])
def test_code_loss_golden(name):
    expected, meta = golden(name)
    asked = []

    class Codes(VQGAN):
        def encode(self, images):
            asked.append(images)
            return expected["target_tokens"].long()

    with torch.device("meta"):
        tokenizer = Codes()
    model = reference_of(meta, "reconstruct", torch.float32, tokenizer)
    image = golden_image(meta)
    found = reconstruction_predictions(model, model.encode(image)["lowrank"], image)
    assert relative_error(found["VQ-CE"].reshape(1), expected["vq_ce"]) < LOSS
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    assert relative_error(found["x_hat"][:, ::stride], expected["logits"]) < TENSOR
    assert found["x_original"] is asked[0]
    assert found["x_original"].shape == expected["reconstruction"].shape
    if meta["backbone"]["patch_size"] == 16:
        assert found["x_original"] is image
    else:
        of_cells = F.interpolate(image, size=(256, 256), mode="bicubic", align_corners=False)
        assert relative_error(found["x_original"], of_cells) < TENSOR


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_losses_of_the_published_methods(dtype):
    """Taken one by one, as code that goes its own way through them does."""
    expected, meta = golden("pretrain-tiny16")
    model, inputs = golden_model(meta, dtype), inputs_as(dtype, meta)
    with torch.no_grad():
        cls, sparse, _ = model.forward_image(inputs["image"])
        logits, assigned, loss = model.clustering_head(sparse)
        _, cls_assigned, cls_loss = model.cls_cluster_head(cls)
        views = inputs["global_views"].flatten(0, 1)
        masked_cls, masked, mask, ids_restore = model.forward_masked(views, ratio=0.0)
        assert not mask.any() and torch.equal(ids_restore.sort(1).values[0], torch.arange(196))
        index, _ = model.match_tokens(masked, sparse)
        local, _, _ = model.forward_image(inputs["local_views"].flatten(0, 1))
        masked_logits, none, _ = model.clustering_head(masked, do_sinkhorn=False)
        assert none is None
        cls_logits = [model.cls_cluster_head(x, do_sinkhorn=False)[0] for x in (masked_cls, local)]
        found = {
            "clustering_loss": loss,
            "cls_clustering_loss": cls_loss,
            "mask_loss": model.contrastive_loss(masked_logits, assigned, index),
            "cls_loss": sum(model.contrastive_loss(x, cls_assigned) for x in cls_logits),
        }
        assert relative_error(model.contrastive_loss(logits, assigned), loss) < LOSS
    for name, value in found.items():
        assert relative_error(value.reshape(1), expected[f"loss.{name}"]) < LOSS, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_losses_of_the_teachers_methods(dtype):
    expected, meta = golden("pretrain-tiny16-teacher")
    model, inputs = golden_model(meta, dtype), inputs_as(dtype, meta)
    model.update_teacher()
    with torch.no_grad():
        teacher_cls, teacher, dense = model.forward_teacher(inputs["global_views"][:, 1])
        assert dense.shape == (meta["batch"], 196, meta["backbone"]["hidden_size"])
        _, assigned, _ = model.teacher_head(teacher)
        _, cls_assigned, _ = model.teacher_cls_head(teacher_cls)
        cls, sparse, _ = model.forward_image(inputs["image"])
        index, _ = model.match_tokens(sparse, teacher)
        logits, _, _ = model.clustering_head(sparse, do_sinkhorn=False)
        cls_logits, _, _ = model.cls_cluster_head(cls, do_sinkhorn=False)
        found = {
            "clustering_loss": model.contrastive_loss(logits, assigned, index),
            "cls_clustering_loss": model.contrastive_loss(cls_logits, cls_assigned),
        }
    for name, loss in found.items():
        assert relative_error(loss.reshape(1), expected[f"loss.{name}"]) < LOSS, name
