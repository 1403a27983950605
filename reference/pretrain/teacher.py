"""The teacher: an exponential moving average of encoder, sparse tokens and clustering heads.

Its tensors are published as `teacher_encoder.*`, `teacher_sparse_tokens`, `teacher_head.*` and
`teacher_cls_head.*`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import Autoencoder, encode_with
from ..vit import VisionTransformer
from .distributed import several_processes

STUDENTS = {  # teacher's module -> the student's that it follows
    "teacher_encoder": "encoder",
    "teacher_head": "clustering_head",
    "teacher_cls_head": "cls_cluster_head",
}


def attach_teacher(model: Autoencoder) -> None:
    """Gives `model` a teacher that is equal to it and needs no gradient.

    A state dict without any teacher, such as the published files, loaded with `strict=False`,
    starts the teacher anew as a copy of the weights loaded.
    """
    for teacher, student in STUDENTS.items():
        if hasattr(model, student):
            setattr(model, teacher, copy.deepcopy(getattr(model, student)).requires_grad_(False))
    model.teacher_sparse_tokens = nn.Parameter(
        model.sparse_tokens.detach().clone(), requires_grad=False
    )
    model.register_load_state_dict_post_hook(_start_missing_teacher)


def scheduled_momentum(step: int, steps: int, first: float, last: float) -> float:
    """The momentum of update `step`, from 0: a half cosine from `first` to `last` in `steps`."""
    progress = min(step / steps, 1.0)
    return last - (last - first) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_teacher(model: Autoencoder, momentum: float) -> None:
    """`t = m t + (1 - m) s` for every tensor of the teacher, then `sync_teacher`."""
    for teacher, student in _pairs(model):
        teacher.mul_(momentum).add_(student, alpha=1 - momentum)
    sync_teacher(model)


@torch.no_grad()
def sync_teacher(model: Autoencoder) -> None:
    """Where several processes train together, gives all of them the teacher of rank 0.

    Every process has to call it. Nothing happens outside an initialised process group.
    """
    if several_processes():
        for teacher, _ in _pairs(model):
            dist.broadcast(teacher, src=0)


@torch.no_grad()
def encode_with_teacher(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's `forward_image` of images (B, 3, H, W) in [0, 1]."""
    encoder = model.get_submodule("teacher_encoder")
    assert isinstance(encoder, VisionTransformer)
    embeddings = encoder.embeddings(model.normalize(images))
    return encode_with(encoder, embeddings, model.get_parameter("teacher_sparse_tokens"))


def _pairs(model: Autoencoder) -> Iterator[tuple[Tensor, Tensor]]:
    for teacher, student in STUDENTS.items():
        if hasattr(model, teacher):
            yield from zip(
                getattr(model, teacher).parameters(),
                getattr(model, student).parameters(),
                strict=True,
            )
    yield model.get_parameter("teacher_sparse_tokens"), model.sparse_tokens


def _start_missing_teacher(module: nn.Module, incompatible: Any) -> None:
    own = [name for name in module.state_dict() if name.startswith("teacher_")]
    missing = {name[name.find("teacher_") :] for name in incompatible.missing_keys}
    if not missing.issuperset(own):
        return
    with torch.no_grad():
        for teacher, student in _pairs(module):  # type: ignore[arg-type]
            teacher.copy_(student)
