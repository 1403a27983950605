"""What an extraction computes in: what its plan says, and the scales of int8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import StellarError
from ..images.presets import check_preset
from .input import discover
from .input.addresses import Allowed
from .options import Job
from .output.folder import ENGINE, Locks, check_output, remove
from .output.layout import read_plan
from .records import Item
from .work.workers import Workers, cores

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 32  # images that scales come from
Load = Callable[..., Any]


def planned(job: Job, precision: str) -> str:
    """`precision`; for "auto" that of the plan, if there is one: what is tried again might be
    another, and then the bytes would be."""
    if precision != "auto" or job.options.overwrite or job.options.dummy_writer:
        return precision
    if not check_output(job.output, overwrite=False):
        return precision
    return read_plan(job.output).configuration["precision"]


def with_scales(job: Job, load: Load, say: Callable[[str], None]) -> Load:
    """`load` of an int8 engine that is calibrated on a sample of the job's own input.

    Its packed weights are kept in the output, in the folder `engine`, and every process, resumption
    and machine loads those: the plan names them by their hash.

    Args:
        load: of keywords as `stellar_fast.load` has them.
        say: is told what the scales come from.

    Raises:
        ValueError: with a dummy writer, which keeps nothing.
        StellarError: no image of the sample can be read; or the scales are gone.
    """
    if job.options.dummy_writer:
        raise ValueError(
            "int8 scales are kept in the output, and a dummy writer has none: give --repo the "
            "folder of a calibrated engine (Engine.save) and --precision auto"
        )
    folder = job.output / ENGINE
    with Locks(job.output) as locks, locks.planning():
        if job.options.overwrite:
            locks.check_free()
            remove(folder)
        if not (folder / "config.json").is_file():
            engine = load(device="cpu")
            if engine.calibrated:  # --repo has one
                return load
            if job.items is None:
                raise StellarError(f"{folder}: the int8 engine of this extraction is gone")
            pixels = sample(job)
            engine.calibrate(pixels)
            engine.save(folder)
            say(f"int8 calibrated on {len(pixels)} images of the input, kept in {folder}")
    return functools.partial(load, repo=str(folder), weights="pretrained", revision=None)


def sample(job: Job) -> Tensor:
    """Some images of a job as the model sees them, evenly spread over its input.

    Raises:
        StellarError: none of them can be read.
    """
    assert job.items is not None
    workers = Workers(
        job.workers,
        job.configuration["preset"],
        SAMPLE,
        scaled_decode=job.configuration["scaled_decode"],
        dummy=job.options.dummy_reader,
        allowed=job.allowed,
        limits=job.limits,
    )
    return _read(job.items, SAMPLE, workers)


def read_images(source: str, preset: str, count: int, *, scaled_decode: bool = False) -> Tensor:
    """As many images of a folder, list or tars, (N, 3, 224, 224), evenly spread over it.

    Args:
        scaled_decode: see `images.load_image`. Which images can be read does not depend on it.

    Raises:
        ValueError: `source` is none of these, or has no images.
        StellarError: none of them can be read.
    """
    check_preset(preset)
    allowed = Allowed.of(source, (), ())
    items = discover(source, None, allowed)
    workers = Workers(cores(), preset, count, scaled_decode=scaled_decode, allowed=allowed)
    return _read(items, count, workers)


def _read(items: Sequence[Item], count: int, workers: Workers) -> Tensor:
    import torch

    items = items[:: max(1, len(items) // count)][:count]
    pixels, reasons = [], []
    try:
        for outcome in workers.decode(items, lambda: False):
            if outcome.reason is None:
                pixels.append(torch.from_numpy(workers.slots.array[outcome.slot].copy()))
            else:
                reasons.append(outcome.reason)
    finally:
        workers.close()
    if not pixels:
        raise StellarError(f"none of {len(items)} images can be read: {reasons[0]}")
    return torch.stack(pixels)
