"""What the training forward does beyond the published outputs: parts, views, masks, errors."""

import sys
from dataclasses import replace

import pytest
import torch
from budgets import LOSS
from checkpoints import relative_error
from pretraining import GRID, TINY, tiny_inputs, tiny_model

from stellar_fast.errors import MissingExtraError
from stellar_fast.reference.pretrain.augment import augment_colors
from stellar_fast.reference.pretrain.clustering import sinkhorn_knopp, soft_cross_entropy
from stellar_fast.reference.pretrain.koleo import koleo_loss
from stellar_fast.reference.pretrain.losses import training_loss
from stellar_fast.reference.vqgan import VQGAN

pytestmark = pytest.mark.numerical
FEATURES = {"sparse", "spatial", "dense", "lowrank", "cls", "concat", "peak_dist"}
PIXELS = {"MSE", "x_hat", "x_original"}
CLUSTERING = {"clustering_loss", "cls_clustering_loss", "mask_loss", "cls_loss"}


def predict(model, inputs, seed=0):
    torch.manual_seed(seed)
    return model(inputs)["predictions"]


@pytest.mark.parametrize(
    ("arguments", "losses"),
    [
        ({}, {"koleo_loss"} | PIXELS | CLUSTERING),
        ({"do_koleo": False}, PIXELS | CLUSTERING),
        ({"do_recon": False}, {"koleo_loss"} | CLUSTERING),
        ({"do_clustering": False}, {"koleo_loss"} | PIXELS),
        ({"do_cls": False}, {"koleo_loss", "clustering_loss", "mask_loss"} | PIXELS),
        ({"do_masking": False}, {"koleo_loss"} | PIXELS | CLUSTERING - {"mask_loss"}),
        ({"do_cropping": False}, {"koleo_loss"} | PIXELS | CLUSTERING),
        (
            {"do_masking": False, "do_cropping": False},
            {"koleo_loss"} | PIXELS | CLUSTERING - {"mask_loss", "cls_loss"},
        ),
        ({"momentum_teacher": True}, {"koleo_loss"} | PIXELS | CLUSTERING),
        ({"momentum_teacher": True, "do_cls": False}, None),
        ({"momentum_teacher": True, "do_masking": False, "hungarian_match": False}, None),
    ],
)
def test_the_losses_are_those_asked_for(arguments, losses):
    model, inputs = tiny_model(**arguments), tiny_inputs()
    predictions = predict(model, inputs)
    if losses is not None:
        assert predictions.keys() == FEATURES | {"gold_labels"} | losses
    assert predictions["gold_labels"] is inputs["labels"]
    total = training_loss(predictions)
    assert total.ndim == 0 and total.isfinite()
    total.backward()


def test_only_the_views_that_are_used_are_asked_for():
    inputs = tiny_inputs()
    few = {key: inputs[key] for key in ("image", "labels")}
    assert "koleo_loss" in predict(tiny_model(do_clustering=False), few)
    no_views = predict(tiny_model(do_masking=False, do_cropping=False), few)
    assert "cls_clustering_loss" in no_views
    crops = few | {"local_views": inputs["local_views"]}
    assert "cls_loss" in predict(tiny_model(do_masking=False), crops)


def test_views_beyond_the_number_asked_for_are_not_looked_at():
    model, inputs = tiny_model(), tiny_inputs()
    more = tiny_inputs(views=4, crops=5)
    for name in ("global_views", "local_views"):
        more[name][:, :2] = inputs[name]
    expected, found = predict(model, inputs), predict(model, more)
    for name in CLUSTERING:
        assert torch.equal(found[name], expected[name]), name


def test_the_losses_by_their_formulas():
    model, inputs = tiny_model(), tiny_inputs()
    found = predict(model, inputs)
    with torch.no_grad():
        own = model.encode(inputs["image"])
        logits = model.clustering_head(own["sparse"], do_sinkhorn=False)[0].flatten(0, 1)
        targets = sinkhorn_knopp(logits / 0.06)
        expected = soft_cross_entropy(logits, targets, 0.12)
        assert relative_error(found["clustering_loss"], expected) < LOSS

        masked = model.encode(inputs["global_views"].flatten(0, 1))["sparse"]
        koleo = 0.1 * (koleo_loss(own["sparse"]) + koleo_loss(masked))
        assert relative_error(found["koleo_loss"], koleo) < LOSS

        cls_logits = model.cls_cluster_head(own["cls"], do_sinkhorn=False)[0].flatten(0, 1)
        cls_targets = sinkhorn_knopp(cls_logits / 0.06)
        halves = []
        for name in ("global_views", "local_views"):
            cls = torch.stack(
                [model.encode(inputs[name][:, view])["cls"][:, 0] for view in range(2)], dim=1
            )
            of_views = cls_targets.unsqueeze(1).expand(-1, 2, -1)
            halves.append(soft_cross_entropy(model.cls_cluster_head(cls, False)[0], of_views, 0.12))
        assert relative_error(found["cls_loss"], sum(halves)) < LOSS


def test_matching_undoes_the_order_of_tokens():
    # the views are the images, but with the learned tokens in another order
    model, inputs = tiny_model(do_cropping=False, num_masks=1), tiny_inputs(views=1)
    inputs["global_views"] = inputs["image"].unsqueeze(1)
    straight = predict(model, inputs)["mask_loss"].detach()
    encode = model.encode_kept

    def shuffled(images, keep):
        cls, sparse, dense = encode(images, keep)
        return cls, sparse[:, [2, 0, 3, 1]], dense

    model.encode_kept = shuffled
    assert relative_error(predict(model, inputs)["mask_loss"], straight) < LOSS
    model.hungarian_match = False
    assert predict(model, inputs)["mask_loss"] > 1.1 * straight


@pytest.mark.parametrize("mode", [None, "gaussian", "block"])
def test_masked_views_show_only_the_patches_kept(mode):
    model = tiny_model(masking_ratio=0.7, focal_mode=mode, do_cropping=False)
    inputs = tiny_inputs()
    inputs["global_views"].requires_grad_()
    predict(model, inputs)["mask_loss"].backward()
    seen = inputs["global_views"].grad.abs().flatten(0, 1).sum(1)
    seen = seen.unflatten(2, (GRID, 16)).unflatten(1, (GRID, 16)).sum((2, 4)) > 0
    assert seen.flatten(1).sum(1).tolist() == [int(GRID * GRID * 0.3)] * 6
    assert len({tuple(view) for view in seen.flatten(1).tolist()}) > 1


def test_masks_follow_the_seed():
    model, inputs = tiny_model(masking_ratio=0.7, focal_mode="gaussian"), tiny_inputs()
    first, again, other = (predict(model, inputs, seed)["mask_loss"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_colour_augmentation_touches_the_views_alone():
    for arguments, moved in (
        ({"do_cropping": False}, {"mask_loss", "cls_loss", "koleo_loss"}),
        ({"do_masking": False}, {"cls_loss"}),
    ):
        model, inputs = tiny_model(**arguments), tiny_inputs()
        plain = predict(model, inputs)
        model.color_augmentation, model.augment = True, augment_colors
        changed = [predict(model, inputs, seed) for seed in range(10)]
        for name in {"koleo_loss", "MSE"} | CLUSTERING & plain.keys():
            moves = sum(not torch.equal(each[name], plain[name]) for each in changed)
            assert moves > 5 if name in moved else moves == 0, name


def test_local_views_are_augmented_whatever_is_said_of_the_global_ones():
    model, inputs = tiny_model(), tiny_inputs()
    plain = predict(model, inputs)
    model.augment = augment_colors
    changed = [predict(model, inputs, seed) for seed in range(10)]
    for name in {"koleo_loss", "MSE"} | CLUSTERING:
        moves = sum(relative_error(each[name], plain[name].detach()) > LOSS for each in changed)
        assert moves > 5 if name == "cls_loss" else moves == 0, name


def test_views_are_augmented_in_two_calls_one_draw_each():
    model, inputs = tiny_model(color_augmentation=True, momentum_teacher=True), tiny_inputs()
    calls = []
    model.augment = lambda views: calls.append(tuple(views.shape)) or views
    predict(model, inputs)
    assert calls == [(6, 3, 64, 64), (6, 3, 32, 32)]
    for arguments in ({"do_cropping": False}, {"do_cls": False}):
        calls.clear()
        model = tiny_model(color_augmentation=True, **arguments)
        model.augment = lambda views: calls.append(tuple(views.shape)) or views
        predict(model, inputs)
        assert calls == [(6, 3, 64, 64)]


def test_global_alignment_without_matching_is_token_by_token():
    model, inputs = tiny_model(do_global_align=True, hungarian_match=False), tiny_inputs()
    found = predict(model, inputs)
    with torch.no_grad():
        views = inputs["image"], inputs["global_views"][:, 1]
        tokens = [model.encode(view) for view in views]
        for name, head, key in (
            ("clustering_loss", model.clustering_head, "sparse"),
            ("cls_clustering_loss", model.cls_cluster_head, "cls"),
        ):
            first, second = (head(each[key], do_sinkhorn=False)[0].flatten(0, 1) for each in tokens)
            halves = [
                soft_cross_entropy(one, sinkhorn_knopp(other / 0.06), 0.12)
                for one, other in ((first, second), (second, first))
            ]
            assert relative_error(found[name], sum(halves) / 2) < LOSS, name


def test_fewer_views_than_asked_for_are_all_that_are_used():
    few = tiny_inputs(views=2, crops=2)
    expected = predict(tiny_model(), few)
    found = predict(tiny_model(num_masks=8, num_local_crops=5), few)
    for name in CLUSTERING:
        assert torch.equal(found[name], expected[name]), name


def test_colour_augmentation_without_kornia_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    model = tiny_model(color_augmentation=True, momentum_teacher=True)
    model.augment = augment_colors
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[pretrain\]"):
        model(tiny_inputs())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    few = {key: value for key, value in tiny_inputs().items() if "views" not in key}
    model = tiny_model(color_augmentation=True, do_clustering=False)
    model.augment = augment_colors
    assert "MSE" in model(few)["predictions"]  # nothing to augment


def test_targets_have_no_gradient():
    # the image's own tokens are in the losses of other views as targets only
    predictions = predict(tiny_model(), tiny_inputs())
    for loss, tokens in (("mask_loss", "sparse"), ("cls_loss", "cls")):
        (gradient,) = torch.autograd.grad(
            predictions[loss], predictions[tokens], allow_unused=True, retain_graph=True
        )
        assert gradient is None, loss


def test_a_few_steps_lower_the_total():
    model = tiny_model(masking_ratio=0.5, focal_mode="gaussian")
    torch.nn.init.trunc_normal_(model.reconstruction_head.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.04)
    inputs = tiny_inputs()
    torch.manual_seed(0)
    totals = []
    for _ in range(25):
        loss = training_loss(model(inputs)["predictions"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])


def test_training_loss_weighs_as_published():
    tensor = torch.tensor
    losses = {"koleo_loss": tensor(0.5), "mask_loss": tensor(2.0), "sparse": torch.ones(2, 3)}
    assert training_loss(losses).item() == pytest.approx(2.5)
    assert training_loss(losses | {"VQ-CE": tensor(4.0)}).item() == pytest.approx(2.7)
    assert training_loss(losses | {"MSE": tensor(0.25)}).item() == pytest.approx(5.0)
    with pytest.raises(ValueError, match=r"no loss among the predictions \['sparse'\]"):
        training_loss({"sparse": torch.ones(2, 3)})


def test_mixed_precision_gives_float32_losses():
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        expected = predict(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(model, inputs)
    for name in {"koleo_loss", "MSE"} | CLUSTERING:
        assert found[name].dtype == torch.float32, name
        assert relative_error(found[name], expected[name]) < 0.1, name
    training_loss(found).backward()


def without(name):
    return lambda inputs: inputs.pop(name)


def change(name, function):
    def changed(inputs):
        inputs[name] = function(inputs[name])

    return changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("image"), "missing: image"),
        (without("labels"), "missing: labels"),
        (without("global_views"), "missing: global_views"),
        (without("local_views"), "missing: local_views"),
        (change("image", lambda x: x[0]), r"image must be .* \(3, 64, 64\)"),
        (change("image", lambda x: x[:, :1]), r"image must be .* \(3, 1, 64, 64\)"),
        (change("image", lambda x: x[:0]), r"B at least 1, .* \(0, 3, 64, 64\)"),
        (change("image", lambda x: x.numpy()), "got ndarray"),
        (change("image", lambda x: (255 * x).byte()), "torch.uint8"),
        (change("global_views", lambda x: x[:, :0]), "2 views of global_views.* has 0"),
        (change("local_views", lambda x: x[:, :0]), "2 views of local_views.* has 0"),
        (change("global_views", lambda x: x[:2]), r"B = 3 .*\(2, 2, 3, 64, 64\)"),
        (change("local_views", lambda x: x[:, 0]), r"local_views must be .*\(3, 3, 32, 32\)"),
        (change("global_views", lambda x: x.transpose(2, 4)), r"\(3, 2, 64, 64, 3\)"),
        (change("local_views", lambda x: x.round().int()), "torch.int32"),
        (change("local_views", lambda x: x[..., :8]), "hold no patch"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(spoil, message):
    inputs = tiny_inputs()
    spoil(inputs)
    with pytest.raises(ValueError, match=message):
        tiny_model()(inputs)


@pytest.mark.parametrize(
    ("size", "message"),
    [((64, 72), "64, 64.* pixels for an image of .*64, 72"), ((32, 96), "12 is no square number")],
)
def test_images_that_cannot_be_reconstructed_are_refused(size, message):
    inputs = tiny_inputs()
    inputs["image"] = torch.rand(3, 3, *size)
    with pytest.raises(ValueError, match=message):
        tiny_model()(inputs)
    predict(tiny_model(do_recon=False), inputs)  # all else takes any size


def test_codes_that_do_not_fit_the_patches_are_refused():
    model = tiny_model(vq_model=VQGAN(), vit_pretrained=replace(TINY, patch_size=8))
    with pytest.raises(ValueError, match="16 codes for the image and the model 64 patches"):
        model(tiny_inputs())
