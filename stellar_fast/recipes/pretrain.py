"""Goes on with pretraining on a folder of photographs: the published settings in a plain loop.

    python -m stellar_fast.recipes.pretrain photos/ run/ --vq-model PATH --epochs 10
    torchrun --nproc-per-node 8 -m stellar_fast.recipes.pretrain photos/ run/ --vq-model PATH

Killed, the same command goes on behind the last whole epoch, with the numbers that an unbroken run
would have. Views are drawn by kornia (extra `pretrain`).
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from ..errors import ImageError
from ..extract.input import discover
from ..files import replacing
from ..images.reader import decode
from ..loading import load_stellar
from ..reference import STELLARModel
from ..reference.pretrain import training_loss
from ..reference.pretrain.augment import training_views
from ..weights.manifest import write_config

# The published run's, for 128 images a process; the masking ratio is not the constructor's default.
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1.5e-4, 0.04, 3.0
BATCH, EPOCHS, MASKING_RATIO = 128, 150, 0.8
CHECKPOINT = "last.ckpt"
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}

Views = dict[str, Tensor]


class Photographs(Dataset[Views | None]):
    """The training views of each photograph of a folder; None, with a warning, of one that cannot
    be read.

    Args:
        folder: searched with all that is under it; or a list of paths, as `stellar-fast extract`
            takes it.
        num_global, num_local: views of each photograph.

    Raises:
        ValueError: there are no photographs.
    """

    def __init__(self, folder: Path, num_global: int, num_local: int) -> None:
        self.files = [item.file for item in discover(folder)]
        self.num_global, self.num_local = num_global, num_local

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Views | None:
        """image (3, 224, 224), global_views (num_global, 3, 224, 224), local_views (num_local, 3,
        96, 96), float32 in [0, 1]; labels: the index."""
        try:
            picture = decode(self.files[index])
        except ImageError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            return None
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        views = training_views(pixels, self.num_global, self.num_local)
        return views | {"labels": torch.tensor(index)}


def collate(views: Sequence[Views | None]) -> Views:
    """A batch of those that could be read.

    Raises:
        ImageError: none could.
    """
    found = [each for each in views if each is not None]
    if not found:
        raise ImageError("a whole batch", "none of its photographs can be read")
    return default_collate(found)


def pretrain(
    model: STELLARModel,
    photographs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    epochs: int = EPOCHS,
    batch_size: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    precision: str = "fp32",
    workers: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Trains `model`, on the device it is on, and leaves its weights in `output`.

    AdamW, a cosine from `learning_rate` to 0 over all steps, gradients clipped at 3. Inside a
    process group every process takes its share of the photographs. A model with a momentum teacher
    and no length of its schedule gets that of the run.

    Args:
        model: as `load_stellar(..., purpose="pretrain")` gives it.
        photographs: a folder; what is not a multiple of a batch is left out of an epoch.
        output: `last.ckpt` after every epoch, from which the same call goes on; at the end
            `config.json` and weights in the published layout, for `load` and `load_stellar`.
        batch_size: photographs of a step, in each process.
        precision: "bf16" runs the forward under autocast.
        workers: processes that decode and draw views; 0 is this one.

    Returns:
        For every epoch that was run the mean of each loss and of their weighted sum, "total".

    Raises:
        ValueError: unknown precision, or fewer photographs than a batch.
        ImageError: not one photograph of a batch can be read.
        StellarError: `output` cannot be written.
    """
    if precision not in AUTOCAST:
        raise ValueError(f"precision must be one of {', '.join(AUTOCAST)}, got {precision!r}")
    device, output = model.sparse_tokens.device, Path(output)
    rank, processes = _place()
    data = Photographs(Path(photographs), model.num_masks, model.num_local_crops)
    sampler: DistributedSampler[Views | None] = DistributedSampler(
        data, processes, rank, shuffle=True, seed=seed, drop_last=True
    )
    steps = len(sampler) // batch_size
    if not steps:
        raise ValueError(
            f"{len(sampler)} photographs a process do not fill a batch of {batch_size}"
        )
    loader = DataLoader(
        data,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    output.mkdir(parents=True, exist_ok=True)
    first = _resume(output / CHECKPOINT, model, optimizer, schedule)
    if model.teacher_momentum_schedule_steps is None:
        model.teacher_momentum_schedule_steps = epochs * steps
    # Parts of the published model are reached by no loss.
    wrapped = (
        DistributedDataParallel(model, find_unused_parameters=True) if processes > 1 else model
    )

    history = []
    for epoch in range(first, epochs):
        # So that an epoch draws the same whether or not the run was broken off before it.
        torch.manual_seed(seed + epoch * processes + rank)
        sampler.set_epoch(epoch)
        sums: dict[str, float] = {}
        for step, batch in enumerate(loader, epoch * steps):
            model._step_counter.fill_(step)
            losses = _step(wrapped, trained, optimizer, batch, device, AUTOCAST[precision])
            schedule.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / steps
        history.append(sums)
        if rank == 0:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in sums.items())
            say(f"epoch {epoch + 1} of {epochs}  {shown}")
            state = {
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            }
            with replacing(output / CHECKPOINT) as temporary:
                torch.save(state, temporary)
    if rank == 0:
        save(model, output)
    return history


def save(model: STELLARModel, folder: Path) -> None:
    """Writes weights and `config.json` in the published layout, under the name "stellar".

    Raises:
        StellarError: they cannot be written.
    """
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("tokenizer.")
    }
    with replacing(folder / "stellar.safetensors") as temporary:
        save_file(state, temporary)
    write_config(
        folder,
        replace(model.config, name="stellar"),
        "stellar.safetensors",
        do_cls=model.do_cls,
        num_clusters=model.num_clusters,
        recon_type="pixel" if model.tokenizer is None else "vq",
    )


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _resume(path: Path, model: nn.Module, optimizer: Any, schedule: Any) -> int:
    """Takes up what `path` holds, if it is there: the epochs that were run."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["state_dict"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["epoch"]


def _step(
    model: nn.Module,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: Views,
    device: torch.device,
    autocast: torch.dtype | None,
) -> dict[str, float]:
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        predictions = model(moved)["predictions"]
        total = training_loss(predictions)
    optimizer.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(trained, CLIP)
    optimizer.step()
    scalars = {n: v for n, v in predictions.items() if v.ndim == 0 and v.requires_grad}
    return {name: value.item() for name, value in (scalars | {"total": total}).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m stellar_fast.recipes.pretrain`, or the same under torchrun."""
    parser = argparse.ArgumentParser(
        prog="python -m stellar_fast.recipes.pretrain", description=__doc__
    )
    add = parser.add_argument
    add("photographs", type=Path, help="a folder, searched with all that is under it")
    add("output", type=Path, help="a folder, made if it is not there")
    add("--model", default="stellar-b16", help="that training goes on from")
    add("--repo", default="microsoft/STELLAR", help="that has it: a Hub repository or a folder")
    add("--vq-model", type=Path, help="the tokenizer's file")
    add("--device", help="cuda where there is one, else cpu")
    add("--epochs", type=int, default=EPOCHS)
    add("--batch-size", type=int, default=BATCH, help="photographs of a step, in each process")
    add("--learning-rate", type=float, default=LEARNING_RATE)
    add("--masking-ratio", type=float, default=MASKING_RATIO)
    add("--views", type=int, default=8, help="masked global views, and as many local ones")
    add("--precision", choices=AUTOCAST, default="fp32")
    add("--workers", type=int, default=0, help="processes that decode, for each process")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:  # torchrun's
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    model = load_stellar(
        options.model,
        "pretrain",
        options.vq_model,
        options.repo,
        device,
        masking_ratio=options.masking_ratio,
        num_masks=options.views,
        num_local_crops=options.views,
    )
    try:
        pretrain(
            model,
            options.photographs,
            options.output,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            precision=options.precision,
            workers=options.workers,
            seed=options.seed,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
