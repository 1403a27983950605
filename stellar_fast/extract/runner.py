"""The loop: images decoded by a pool of threads ahead of the engine, features written in order."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm import tqdm

from ..errors import ImageError
from ..images import SIZE, check_preset, load_image
from .folder import check_output, staged
from .reader import Item, PathLike, discover
from .writer import FeatureFile, write_index, write_run

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import ModelConfig

FEATURES = ("sparse", "cls", "spatial", "dense")
DEFAULT_FEATURES = ("sparse", "cls")
DTYPES = ("float32", "float16")
# Decoded images that wait for the engine, in batches: one is encoded while the next fills.
BATCHES_AHEAD = 2


class Encoder(Protocol):
    """What `run` needs of an `Engine`."""

    config: ModelConfig
    precision: str
    weights: str
    max_batch: int

    def encode(
        self, images: Any, *, outputs: Collection[str] | None = ..., check_range: bool = ...
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Job:
    """A checked extraction, made by `plan`."""

    source: Path
    output: Path
    items: Sequence[Item]
    features: tuple[str, ...]
    dtype: str
    preset: str
    batch_size: int | None
    workers: int
    overwrite: bool


@dataclass(frozen=True)
class Summary:
    """What an extraction did: counts of images, and seconds from its first image to its last file.

    Attributes:
        seconds: by stage. `total` is the wall clock; `decode` adds up the threads' time; `wait` is
            the engine's time without work.
    """

    images: int
    rows: int
    seconds: Mapping[str, float]

    @property
    def failed(self) -> int:
        return self.images - self.rows

    def __str__(self) -> str:
        total = self.seconds["total"]
        return (
            f"{self.images} images, {self.rows} rows, {self.failed} failed, {total:.2f} s, "
            f"{self.images / total:.1f} images/s"
        )


def plan(
    source: PathLike,
    output: PathLike,
    *,
    features: Collection[str] = DEFAULT_FEATURES,
    dtype: str = "float32",
    preset: str = "card",
    batch_size: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Job:
    """Checks an extraction before any model is loaded.

    Args:
        source: a folder or a list of images, see `discover`.
        output: a folder that is not there or empty; or with `overwrite` an earlier output, which is
            replaced when the new one is whole.
        features: of sparse, cls, spatial, dense.
        dtype: of the files: "float32", as `Engine.encode` gives them, or "float16", half the space
            and three decimal digits; whatever the engine's precision.
        batch_size: images in one call of the engine; None is the engine's own `max_batch`.
        workers: threads that decode; None is one for each core.

    Raises:
        ValueError: an argument that cannot be right; no images; an output that may not be written.
    """
    source, output = Path(source), Path(output).resolve()
    chosen = _check_features(features)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    check_preset(preset)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if workers is None:
        workers = _cores()
    if workers < 1:
        raise ValueError(f"at least 1 worker must decode, got {workers}")
    if source.resolve().is_relative_to(output):
        raise ValueError(f"{output}: the output folder holds the input {source}; choose another")
    check_output(output, overwrite)
    items = discover(source)
    return Job(source, output, items, chosen, dtype, preset, batch_size, workers, overwrite)


def _check_features(features: Collection[str]) -> tuple[str, ...]:
    if "lowrank" in features:
        raise ValueError(
            "lowrank is never stored, it is spatial @ sparse: extract these two and multiply"
        )
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise ValueError(
            f"features must name some of {', '.join(FEATURES)}; got {', '.join(unknown) or 'none'}"
        )
    return tuple(name for name in FEATURES if name in features)


def run(job: Job, engine: Encoder, *, facts: Mapping[str, Any] | None = None) -> Summary:
    """Encodes the images of a job and writes its output folder, whole or not at all.

    Images that cannot be decoded are lines of the index with a reason; they take no row, and no
    place in a batch.

    Args:
        facts: more to say in `run.json`, such as the repository of the weights.

    Raises:
        StellarError: the output cannot be written, or a feature does not fit its dtype.
    """
    timer = _Timer()
    with staged(job.output, job.overwrite) as folder:
        shapes, reasons = _encode_all(job, engine, folder, timer)
        rows = reasons.count(None)
        summary = Summary(len(job.items), rows, timer.finish())
        features = {
            name: {"shape": [rows, *shape], "dtype": job.dtype} for name, shape in shapes.items()
        }
        write_run(folder, {**_facts(job, engine, summary), "features": features, **(facts or {})})
        write_index(folder, [item.path for item in job.items], reasons)
    return summary


def _cores() -> int:
    """Cores that this process may use; all there are where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Timer:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("decode", "wait", "encode", "write"), 0.0)
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        return self.seconds | {"total": time.perf_counter() - self._start}


def _encode_all(
    job: Job, engine: Encoder, folder: Path, timer: _Timer
) -> tuple[dict[str, tuple[int, ...]], list[str | None]]:
    """Writes every feature file; the shape of each feature's rows, and each item's reason."""
    import torch

    batch_size = job.batch_size or engine.max_batch
    check_range = job.preset != "eval"  # its bicubic overshoots [0, 1], as published
    empty = torch.zeros((0, 3, SIZE, SIZE), dtype=torch.uint8)
    none = engine.encode(empty, outputs=job.features)
    shapes = {name: tuple(none[name].shape[1:]) for name in job.features}
    reasons: list[str | None] = []
    batch: list[Tensor] = []

    with ExitStack() as stack:
        files = {
            name: stack.enter_context(
                FeatureFile(folder / f"{name}.npy", shape, np.dtype(job.dtype))
            )
            for name, shape in shapes.items()
        }

        def flush() -> None:
            with timer.stage("encode"):
                out = engine.encode(
                    torch.stack(batch), outputs=job.features, check_range=check_range
                )
                rows = {name: out[name].float().cpu().numpy() for name in files}
            with timer.stage("write"):
                for name, file in files.items():
                    file.append(rows[name])
            batch.clear()

        decoded = stack.enter_context(closing(_decode_ahead(job, batch_size, timer)))
        bar = stack.enter_context(tqdm(total=len(job.items), unit="image", disable=None))
        for image in decoded:
            bar.update()
            if isinstance(image, str):
                reasons.append(image)
                continue
            reasons.append(None)
            batch.append(image)
            if len(batch) == batch_size:
                flush()
        if batch:
            flush()
    return shapes, reasons


def _decode_ahead(job: Job, batch_size: int, timer: _Timer) -> Generator[Tensor | str, None, None]:
    """Each item's pixels, or the reason why there are none, in the order of the items."""
    items = iter(job.items)
    waiting: deque[Future[tuple[Tensor | str, float]]] = deque()
    pool = ThreadPoolExecutor(job.workers, thread_name_prefix="decode")
    try:
        while True:
            room = BATCHES_AHEAD * batch_size + job.workers - len(waiting)
            for item in islice(items, room):
                waiting.append(pool.submit(_decode, item.file, job.preset))
            if not waiting:
                return
            with timer.stage("wait"):
                image, seconds = waiting.popleft().result()
            timer.seconds["decode"] += seconds
            yield image
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(file: str, preset: str) -> tuple[Tensor | str, float]:
    start = time.perf_counter()
    image: Tensor | str
    try:
        image = load_image(file, preset)
    except ImageError as error:
        image = error.reason
    return image, time.perf_counter() - start


def _facts(job: Job, engine: Encoder, summary: Summary) -> dict[str, Any]:
    return {
        "model": engine.config.name,
        "weights": engine.weights,
        "precision": engine.precision,
        "preset": job.preset,
        "input": str(job.source.resolve()),
        "images": summary.images,
        "rows": summary.rows,
        "failed": summary.failed,
        "seconds": {stage: round(value, 3) for stage, value in summary.seconds.items()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("stellar-fast", "torch", "numpy", "pillow", "pyarrow")},
    }
