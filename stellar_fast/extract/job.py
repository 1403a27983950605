"""An extraction from its arguments to its plan, and when one that was begun may be gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StellarError
from ..images.presets import check_preset
from ..images.reader import MAX_PIXELS
from .input import discover
from .input.addresses import Allowed, is_address, localized, shown
from .input.sieve import Sieve
from .output.folder import Locks, check_output, clear
from .output.foreign import DTYPES, FEATURES, FORMATS
from .output.layout import (
    Item,
    Partition,
    PathLike,
    Plan,
    complete,
    difference,
    digest_of,
    read_plan,
    write_plan,
)
from .work.pipeline import Encoder, Options
from .work.sandbox import DECODE_SECONDS, Limits, memory_for
from .work.workers import cores

DEFAULT_FEATURES = ("sparse", "cls")
# At 10 images/s seven minutes of work are in a partition's hands, at 3,000 a file of features is
# 200 MB every second or two. Full batches of any power of two up to this.
PARTITION_SIZE = 4096
MOST_SECONDS = 86_400  # to decode one image in: timers do not take just any number


@dataclass(frozen=True)
class Job:
    """A checked extraction, made by `plan`.

    Attributes:
        configuration: the plan's, but for what the engine decides.
        items: the images; None where those of an existing plan are taken as they are.
        batch_size: None is the existing plan's, or else the engine's `max_batch`.
        share: (k, n): only every n-th partition, from the k-th on; k is from 1 to n.
        skipped: what the input has beside its images, by the reason.
    """

    output: Path
    configuration: Mapping[str, Any]
    items: Sequence[Item] | None
    batch_size: int | None
    options: Options
    share: tuple[int, int]
    overwrite: bool
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        return self.configuration["features"]


def plan(
    source: PathLike,
    output: PathLike,
    *,
    features: Collection[str] = DEFAULT_FEATURES,
    dtype: str = "float32",
    preset: str = "card",
    format: str = "npy",
    batch_size: int | None = None,
    partition_size: int | None = None,
    column: str | None = None,
    skip_duplicates: bool = False,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    decode_seconds: float = DECODE_SECONDS,
    worker_memory: int | None = None,
    on_error: str = "record",
    max_errors: int | None = None,
    retry_failed: bool = False,
    share: tuple[int, int] = (1, 1),
    resume: bool = False,
    overwrite: bool = False,
    dummy_reader: bool = False,
    dummy_writer: bool = False,
    allow_protocols: Collection[str] = (),
    allow_hosts: Collection[str] = (),
) -> Job:
    """Checks an extraction before any model is loaded, and lists its input.

    Args:
        source: a folder, lists or tars of images, see `input.discover`.
        output: a local folder: a new one; or one that the same extraction was begun in, to go on
            with; or with `overwrite` any earlier output, which is then removed.
        features: of sparse, cls, spatial, dense.
        dtype: of the files: "float32", as `Engine.encode` gives them, or "float16", half the space
            and three decimal digits; whatever the engine's precision.
        format: "npy", or "parquet" with an id beside each row.
        batch_size: images in one call of the engine.
        partition_size: images in one partition; `PARTITION_SIZE` if left out.
        column: of a table, the one with the paths.
        skip_duplicates: leave out lines of a list that name a file again; an error otherwise.
        workers: processes that decode; None is one for each core.
        max_pixels: the largest width times height of an image.
        decode_seconds: to decode one image in.
        worker_memory: MiB that a process may take to decode, beyond what it has at its start; if
            left out, 2048, or what `max_pixels` may need if that is more.
        resume: do not look at the input again, and take the images of the existing plan.
        on_error, max_errors, retry_failed, dummy_reader, dummy_writer: see `Options`.
        allow_protocols: of addresses that are read beside the usual ones, such as "ftp".
        allow_hosts: HOST or HOST:PORT, which are read from though they are in a private network;
            the host that `source` names is one of them.

    Raises:
        ValueError: an argument that cannot be right; no images; an output that may not be written,
            or that was begun with another configuration or other images.
        StellarError: the existing plan cannot be read.
    """
    source, output = (os.path.expanduser(os.fspath(path)) for path in (source, output))
    chosen = _check_features(features)
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("format", format, FORMATS),
        ("on_error", on_error, ("record", "fail")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    check_preset(preset)
    workers = cores() if workers is None else workers
    for name, number, least in (
        ("the batch size", batch_size, 1),
        ("the partition size", partition_size, 1),
        ("the number of workers", workers, 1),
        ("max_pixels", max_pixels, 1),
        ("the worker memory in MiB", worker_memory, 1),
        ("max_errors", max_errors, 0),
    ):
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not 0 < decode_seconds <= MOST_SECONDS:  # not a number is none
        raise ValueError(
            f"decode_seconds must be more than 0 and at most {MOST_SECONDS}, got {decode_seconds}"
        )
    if not 1 <= share[0] <= share[1]:
        raise ValueError(
            f"of n shares the first is 1/n and the last n/n, got {share[0]}/{share[1]}"
        )
    if overwrite and (resume or retry_failed or share[1] > 1):
        raise ValueError(
            "overwriting starts anew: it goes neither with resuming, nor with retrying, nor with a "
            "share of the partitions (overwrite with --plan-only, then start the shares)"
        )
    target = _check_place(source, output)
    existing = None
    if not dummy_writer and check_output(target, overwrite):
        existing = read_plan(target)
    if resume and existing is None:
        raise ValueError(f"{output}: there is nothing to resume, as it has no plan")
    known_size = existing.configuration["partition_size"] if existing is not None else None
    size: int = partition_size or known_size or PARTITION_SIZE
    configuration = {
        "input": shown(localized(os.fspath(source))),
        "column": column,
        "preset": preset,
        "features": chosen,
        "dtype": dtype,
        "format": format,
        "partition_size": size,
    }
    allowed = Allowed.of(os.fspath(source), allow_protocols, allow_hosts)
    sieve = Sieve()
    items = None if resume else discover(source, column, allowed, sieve, skip_duplicates)
    if existing is not None:
        _check_same(target, existing.configuration, configuration)
        if batch_size is None:
            batch_size = existing.configuration["batch_size"]
        if items is not None:
            _check_images(target, existing, _partitions(items, size))
    limits = Limits(max_pixels, decode_seconds, worker_memory or memory_for(max_pixels))
    options = Options(
        workers, on_error, max_errors, retry_failed, dummy_reader, dummy_writer, allowed, limits
    )
    return Job(
        target, configuration, items, batch_size, options, share, overwrite, dict(sieve.skipped)
    )


def parse_share(text: str) -> tuple[int, int]:
    """The `share` that "K/N" names.

    Raises:
        ValueError: it is not of this form.
    """
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal()):
        raise ValueError(f"a share is K/N, such as 1/8 for the first of 8, got {text!r}")
    return int(k), int(n)


def _check_features(features: Collection[str]) -> list[str]:
    if "lowrank" in features:
        raise ValueError(
            "lowrank is never stored, it is spatial @ sparse: extract these two and multiply"
        )
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise ValueError(
            f"features must name some of {', '.join(FEATURES)}; got {', '.join(unknown) or 'none'}"
        )
    return [name for name in FEATURES if name in features]


def _check_place(source: PathLike, output: PathLike) -> Path:
    if is_address(os.fspath(output)):
        raise ValueError(f"{output}: the output is a folder of this machine, not an address")
    target = Path(output).resolve()
    place = localized(os.fspath(source))
    if not is_address(place) and Path(place).resolve().is_relative_to(target):
        raise ValueError(f"{output}: the output folder holds the input {source}; choose another")
    return target


def _check_same(output: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError where two configurations differ in what `new` has."""
    changed = difference(old, new, new)
    if changed:
        raise ValueError(
            f"{output}: was begun with another configuration, and may not be gone on with as "
            f"changed: {', '.join(changed)}; choose another output, or --overwrite"
        )


def _check_images(output: Path, existing: Plan, found: Sequence[Partition]) -> None:
    if tuple(found) == existing.partitions:
        return
    pairs = zip(existing.partitions, found, strict=False)
    first = next((old.name for old, new in pairs if old != new), "the last partition")
    raise ValueError(
        f"{output}: the input has changed since the plan was made: {existing.images} images then, "
        f"{sum(part.images for part in found)} now, the first difference in {first}; --resume "
        "goes on with the images of the plan, --overwrite starts anew"
    )


def _partitions(items: Sequence[Item], size: int) -> list[Partition]:
    parts = (items[start : start + size] for start in range(0, len(items), size))
    return [Partition(index, len(part), digest_of(part)) for index, part in enumerate(parts)]


def identify(engine: Encoder) -> dict[str, Any]:
    """What decides an engine's features: for the plan's configuration."""
    digest = engine.weights_sha256
    return {
        "model": json.loads(json.dumps(asdict(engine.config))),
        "weights": f"sha256:{digest}" if digest is not None else engine.weights,
        "precision": engine.precision,
    }


def prepare(
    job: Job, identity: Mapping[str, Any], batch_size: int, facts: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a job: written, or the existing one if it is the same.

    Args:
        identity: by `identify`.
        batch_size: the engine's, where the job names none.
        facts: more to say in the plan, such as the repository of the weights.

    Raises:
        ValueError: the output was begun with another engine.
        StellarError: another run is writing an output that was to be overwritten; the plan cannot
            be written.
    """
    configuration = {
        **identity,
        **job.configuration,
        "batch_size": job.batch_size or batch_size,
    }
    partitions = _partitions(job.items or (), configuration["partition_size"])
    new = Plan(configuration, tuple(partitions), dict(facts or {}))
    if job.options.dummy_writer:
        return new
    with Locks(job.output) as locks, locks.planning():
        if job.overwrite and check_output(job.output, overwrite=False):
            locks.check_free()
            clear(job.output)
        if check_output(job.output, overwrite=False):
            existing = read_plan(job.output)
            _check_same(job.output, existing.configuration, configuration)
            if job.items is not None:
                _check_images(job.output, existing, partitions)
            return existing
        if job.items is None:
            raise StellarError(f"{job.output}: its plan has vanished since it was read")
        write_plan(job.output, new, job.items)
    return new


def todo(job: Job, made: Plan) -> tuple[list[int], dict[int, dict[str, Any]]]:
    """The partitions of a job's share that are to be made, and the manifests of the others.

    Raises:
        StellarError: a complete partition is damaged or of another plan.
    """
    k, n = job.share
    mine = range(k - 1, len(made.partitions), n)
    if job.options.dummy_writer:
        return list(mine), {}
    done = {index: found for index, found in complete(job.output, made).items() if index in mine}
    if job.options.retry_failed:
        done = {index: manifest for index, manifest in done.items() if not manifest["failed"]}
    return [index for index in mine if index not in done], done


def items_of(job: Job, partition: Partition) -> list[Item]:
    """The images of a partition, of a job that listed them."""
    assert job.items is not None
    start = partition.index * job.configuration["partition_size"]
    return list(job.items[start : start + partition.images])
