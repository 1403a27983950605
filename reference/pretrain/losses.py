"""The training forward: every loss of the published recipe, and their weighted sum.

Formulas and constants: arXiv 2602.01905 and the code published with it. Shapes: B images, P
patches, K sparse tokens, D encoder width, C clusters, V views an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import at_least_float32
from .augment import augment_colors, require_kornia
from .clustering import ClusteringHead
from .koleo import koleo_loss
from .student import Student

KOLEO_WEIGHT = 0.1
CODE_WEIGHT = 0.05  # of VQ-CE in the total
PIXEL_WEIGHT = 10.0  # of MSE in the total
TOKENIZER_SIZE = 256  # pixels a side that patch 14's 16x16 grid stands for, in cells of 16x16


class Targets(NamedTuple):
    """What predictions are held against; nothing here has a gradient.

    Attributes:
        tokens: (B, K, D), the sparse tokens that predicted ones are matched to.
        sparse: (B, K, C), their assignments.
        cls: (B, 1, C), the CLS token's; None where `do_cls` is off.
    """

    tokens: Tensor
    sparse: Tensor
    cls: Tensor | None


def training_predictions(
    model: Student, inputs: Mapping[str, Tensor], *, moves_teacher: bool = True
) -> dict[str, Tensor]:
    """The forward pass in training.

    Where several processes train together they must call this together.

    Args:
        inputs: all floating point RGB in [0, 1] but the labels, which are handed through.
            "image" (B, 3, H, W) and "labels"; with `do_clustering` and one of `do_masking`,
            `momentum_teacher` and `do_global_align` "global_views" (B, G, 3, H', W'), of which the
            first `num_masks` are used, or all if there are fewer; with `do_clustering`, `do_cls`
            and `do_cropping` "local_views" (B, L, 3, h, w), of which the first `num_local_crops`
            are used, or all. Further keys are left alone.
        moves_teacher: with `momentum_teacher`, update the teacher before it is asked: the forward
            is one step of the average.

    Returns:
        `model.features`, "gold_labels", and what the model was built to train with: koleo_loss;
        VQ-CE with x_hat (B, P, 1024), or MSE with x_hat (B, 3, H, W), and x_original, the image
        that either is held against; clustering_loss, cls_clustering_loss, mask_loss, cls_loss.
        Losses are scalars with a gradient.

    Raises:
        ValueError: an input is missing or of another shape, there are too few views, or the image
            cannot be held against what the decoder gives.
        MissingExtraError: views are to be augmented, and kornia is not installed.
    """
    image, global_views, local_views = _checked(model, inputs)
    predictions = model.features(image)
    predictions["gold_labels"] = inputs["labels"]
    sparse, cls = predictions["sparse"], predictions["cls"]
    if model.do_koleo:
        predictions["koleo_loss"] = KOLEO_WEIGHT * koleo_loss(sparse)
    if model.do_recon:
        predictions |= reconstruction_predictions(model, predictions["lowrank"], image)
    if not model.do_clustering:
        return predictions

    if global_views is not None and model.color_augmentation:
        global_views = model.augment(global_views.flatten(0, 1)).view_as(global_views)
    if model.momentum_teacher and moves_teacher:
        model.update_teacher()
    losses, targets = _image_losses(model, sparse, cls, global_views)
    predictions |= losses
    cls_losses: list[Tensor] = []
    if model.do_masking and global_views is not None:
        masked_cls, masked_sparse, _, _ = model.forward_masked(
            global_views.flatten(0, 1), ratio=model.masking_ratio
        )
        if model.do_koleo:
            predictions["koleo_loss"] = predictions["koleo_loss"] + KOLEO_WEIGHT * koleo_loss(
                masked_sparse
            )
        index, _ = model.match_tokens(masked_sparse, targets.tokens)
        predictions["mask_loss"] = model.contrastive_loss(
            _logits(model.clustering_head, masked_sparse), targets.sparse, index
        )
        if targets.cls is not None:
            cls_losses.append(
                model.contrastive_loss(_logits(model.cls_cluster_head, masked_cls), targets.cls)
            )
    if local_views is not None and targets.cls is not None:
        local_cls, _, _ = model.forward_image(model.augment(local_views.flatten(0, 1)))
        cls_losses.append(
            model.contrastive_loss(_logits(model.cls_cluster_head, local_cls), targets.cls)
        )
    if cls_losses:
        predictions["cls_loss"] = torch.stack(cls_losses).sum()
    return predictions


def _image_losses(
    model: Student, sparse: Tensor, cls: Tensor, global_views: Tensor | None
) -> tuple[dict[str, Tensor], Targets]:
    """clustering_loss and cls_clustering_loss of the image's tokens, and the targets of its views.

    The targets are the image's own, or with a teacher the teacher's of the second global view.
    """
    if not model.momentum_teacher:
        own = _clustered(model, sparse, cls)
        if not model.do_global_align:
            return own.losses, own.targets
        assert global_views is not None  # `_checked` saw to it
        return _aligned_losses(model, own, global_views[:, 1]), own.targets
    logits = _logits(model.clustering_head, sparse)
    cls_logits = _logits(model.cls_cluster_head, cls) if model.do_cls else None
    assert global_views is not None
    targets = teacher_targets(model, global_views[:, 1])
    index, _ = model.match_tokens(sparse, targets.tokens)
    losses = {"clustering_loss": model.contrastive_loss(logits, targets.sparse, index)}
    if targets.cls is not None and cls_logits is not None:
        losses["cls_clustering_loss"] = model.contrastive_loss(cls_logits, targets.cls)
    return losses, targets


class _Clustered(NamedTuple):
    """Tokens of images: their logits, with gradient, and the losses against their own targets."""

    targets: Targets
    logits: Tensor
    cls_logits: Tensor | None
    losses: dict[str, Tensor]


def _clustered(model: Student, sparse: Tensor, cls: Tensor) -> _Clustered:
    logits, assigned, loss = model.clustering_head(sparse)
    losses, cls_logits, cls_assigned = {"clustering_loss": loss}, None, None
    if model.do_cls:
        cls_logits, cls_assigned, losses["cls_clustering_loss"] = model.cls_cluster_head(cls)
    return _Clustered(Targets(sparse.detach(), assigned, cls_assigned), logits, cls_logits, losses)


def _logits(head: ClusteringHead, tokens: Tensor) -> Tensor:
    logits, _, _ = head(tokens, do_sinkhorn=False)
    return logits


def _aligned_losses(model: Student, own: _Clustered, second: Tensor) -> dict[str, Tensor]:
    """The clustering losses with `do_global_align`: each of two views against the other's targets.

    The first view is the image; `second` (B, 3, H, W) is encoded whole. Both directions take the
    match of the second view's tokens to the first's, as published: the first is not that match's
    inverse.
    """
    cls, sparse, _ = model.forward_image(second)
    other = _clustered(model, sparse, cls)
    index, _ = model.match_tokens(sparse, own.targets.tokens)
    losses = {
        "clustering_loss": model.contrastive_loss(own.logits, other.targets.sparse, index) / 2
        + model.contrastive_loss(other.logits, own.targets.sparse, index) / 2
    }
    if own.cls_logits is not None and other.cls_logits is not None:
        assert own.targets.cls is not None and other.targets.cls is not None
        losses["cls_clustering_loss"] = (
            model.contrastive_loss(own.cls_logits, other.targets.cls) / 2
            + model.contrastive_loss(other.cls_logits, own.targets.cls) / 2
        )
    return losses


def training_loss(predictions: Mapping[str, Tensor]) -> Tensor:
    """The published objective: 0.05 VQ-CE, or 10 MSE, plus every entry whose name holds "loss".

    Args:
        predictions: what `training_predictions` returned.

    Returns:
        A scalar.

    Raises:
        ValueError: no loss is among the predictions.
    """
    terms = [value for name, value in predictions.items() if "loss" in name]
    if "VQ-CE" in predictions:
        terms.append(CODE_WEIGHT * predictions["VQ-CE"])
    if "MSE" in predictions:
        terms.append(PIXEL_WEIGHT * predictions["MSE"])
    if not terms:
        raise ValueError(
            f"no loss among the predictions {sorted(predictions)}: run the model's forward with "
            'mode="train" and at least one of do_recon, do_koleo and do_clustering'
        )
    return torch.stack(terms).sum()


def reconstruction_predictions(model: Student, lowrank: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The reconstruction loss of `lowrank` (B, P, D) against `image` (B, 3, H, W).

    Returns:
        With a tokenizer VQ-CE, x_hat: code logits (B, P, 1024), x_original: the image whose codes
        are the targets, for patch 14 resized to 256x256. Without one MSE, x_hat: pixels
        (B, 3, H, W), x_original: the image.

    Raises:
        ValueError: the image's size does not fit the decoder's grid.
    """
    return image_reconstruction(model, model.forward_decoder(lowrank), image)


def image_reconstruction(model: Student, decoded: Tensor, image: Tensor) -> dict[str, Tensor]:
    """`reconstruction_predictions` of the decoder's output (B, P, 512)."""
    predicted = model.apply_head(decoded)
    if model.tokenizer is None:
        if predicted.shape != image.shape:
            raise ValueError(
                "the pixel head needs square images of whole patches: it draws "
                f"{tuple(predicted.shape[2:])} pixels for an image of {tuple(image.shape[2:])}"
            )
        return {
            "MSE": F.mse_loss(predicted, image.to(predicted.dtype)),
            "x_hat": predicted,
            "x_original": image,
        }
    if model.config.backbone.patch_size == 14:
        image = F.interpolate(
            image, size=(TOKENIZER_SIZE, TOKENIZER_SIZE), mode="bicubic", align_corners=False
        )
    codes = model.tokenizer.encode(image.to(model.tokenizer.quantize.embedding.weight.dtype))
    if codes.shape[1] != predicted.shape[1]:
        raise ValueError(
            f"the tokenizer gives {codes.shape[1]} codes for the image and the model "
            f"{predicted.shape[1]} patches; train with 224x224 images and patches of 14 or 16"
        )
    loss = F.cross_entropy(at_least_float32(predicted.flatten(0, 1)), codes.flatten())
    return {"VQ-CE": loss, "x_hat": predicted, "x_original": image}


@torch.no_grad()
def teacher_targets(model: Student, images: Tensor) -> Targets:
    """The EMA teacher's tokens of images (B, 3, H, W) and their assignments."""
    cls, sparse, _ = model.forward_teacher(images)
    _, assigned, _ = model.teacher_head(sparse)
    cls_assigned = model.teacher_cls_head(cls)[1] if model.do_cls else None
    return Targets(sparse, assigned, cls_assigned)


def _checked(
    model: Student, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The image and those views that the model's losses need, all of them looked at beforehand."""
    local = model.do_clustering and model.do_cls and model.do_cropping
    second = model.do_clustering and (model.momentum_teacher or model.do_global_align)
    masked = model.do_clustering and model.do_masking
    needed = ["image", "labels"] + ["global_views"] * (masked or second) + ["local_views"] * local
    missing = [name for name in needed if name not in inputs]
    if missing:
        raise ValueError(
            f"training needs the inputs {', '.join(needed)}; missing: {', '.join(missing)}"
        )
    image = inputs["image"]
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or not len(image):
        raise ValueError(f"image must be (B, 3, H, W), B at least 1, got {_describe(image)}")
    most = {"global_views": model.num_masks, "local_views": model.num_local_crops}
    used = {
        name: _first_views(inputs[name], name, most[name], len(image))
        for name in needed
        if name in most
    }
    if second and used["global_views"].shape[1] < 2:
        raise ValueError(
            "momentum_teacher and do_global_align encode the second of the global views: num_masks "
            f"is {model.num_masks}, and each image has {inputs['global_views'].shape[1]}"
        )
    if model.augment is augment_colors and (local or (used and model.color_augmentation)):
        require_kornia("colour augmentation of training views")
    return image, used.get("global_views"), used.get("local_views")


def _first_views(views: Tensor, name: str, count: int, batch: int) -> Tensor:
    """The first `count` views of each of `batch` images, or all of them if there are fewer."""
    if (
        not isinstance(views, Tensor)
        or views.ndim != 5
        or views.shape[0] != batch
        or views.shape[2] != 3
        or not views.is_floating_point()
    ):
        raise ValueError(
            f"{name} must be floating point (B, views, 3, H, W) with B = {batch} as in image, got "
            f"{_describe(views)}"
        )
    if count < 1 or not views.shape[1]:
        raise ValueError(
            f"the model trains on {count} views of {name}, and each image has {views.shape[1]}: at "
            "least one is needed"
        )
    return views[:, :count]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
