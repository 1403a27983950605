"""What each of several training processes does; started by test_pretrain_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pretraining import tiny_inputs, tiny_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stellar_fast.reference.pretrain.clustering import sinkhorn_knopp
from stellar_fast.reference.pretrain.losses import training_loss
from stellar_fast.reference.pretrain.teacher import update_teacher

BATCH = 4
ROWS = 24


def scores() -> Tensor:
    """Uneven on purpose: the largest of every column and most of its sum are in the first half."""
    drawn = 3 * torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    drawn[: ROWS // 2] += 2.0
    return drawn


def work(rank: int, processes: int, folder: str) -> None:
    """Joins the group and saves its results as `<rank>.pt` in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    try:
        results = {
            "sinkhorn": sinkhorn_knopp(scores().chunk(processes)[rank], 3, 0.5),
            "teacher": teacher_of_differing_students(rank),
            "step": training_step(rank, processes, momentum_teacher=False),
            "step_with_teacher": training_step(rank, processes, momentum_teacher=True),
        }
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def teacher_of_differing_students(rank: int) -> dict[str, Tensor]:
    model = tiny_model(seed=10 + rank, momentum_teacher=True, teacher_momentum=0.75)
    update_teacher(model, model.teacher_momentum)
    return {key: value for key, value in model.state_dict().items() if key.startswith("teacher_")}


def training_step(rank: int, processes: int, **arguments: Any) -> dict[str, Tensor]:
    """Gradients, and what was not averaged of the losses, of this process's part of a batch."""
    model = tiny_model(**arguments)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    inputs = {key: value.chunk(processes)[rank] for key, value in tiny_inputs(BATCH).items()}
    predictions = parallel(inputs)["predictions"]
    training_loss(predictions).backward()
    losses = {key: value.detach() for key, value in predictions.items() if value.ndim == 0}
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return losses | gradients
