"""An extraction from its arguments to its plan, and when one that was begun may be gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import StellarError
from ..images.presets import least_side
from .input import discover
from .input.addresses import Allowed, is_address, localized, shown
from .input.kept import settled
from .input.sieve import Sieve
from .options import Job, Options
from .output.folder import Locks, check_output, clear
from .output.foreign import DTYPES, FEATURES, INDEX_COLUMNS, KEPT_NAMES, MOST_KEPT
from .output.formats import FORMATS
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
from .output.store import Store, store_of
from .work.pipeline import Encoder, Wanted
from .work.sandbox import Limits, memory_for
from .work.workers import cores

# At 10 images/s seven minutes of work are in a partition's hands, at 3,000 a file of features is
# 200 MB every second or two. Full batches of any power of two up to this.
PARTITION_SIZE = 4096
MOST_SECONDS = 86_400  # to decode one image in: timers do not take just any number


def make_job(source: PathLike, output: PathLike, **options: Any) -> Job:
    """Checks an extraction before any model is loaded, and lists its input.

    Args:
        source: a folder, lists or tars of images, see `input.discover`.
        output: a folder, or the address of one in a store: a new one; or one that the same
            extraction was begun in, to go on with; or with `overwrite` any earlier output, which is
            then removed.
        options: the fields of `Options`.

    Raises:
        TypeError: an option that there is not.
        ValueError: an argument that cannot be right; no images; an output that may not be written,
            or that was begun with another configuration or other images.
        StellarError: the existing plan, or a store, cannot be read.
    """
    source, output = (os.path.expanduser(os.fspath(path)) for path in (source, output))
    chosen = Options(**options)
    configuration = _check(chosen)
    allowed = Allowed.of(os.fspath(source), chosen.allow_protocol, chosen.allow_host)
    store = None if chosen.dummy_writer else store_of(output, allowed)
    target = _check_place(source, output, store)
    if store is not None:
        store.fetch(chosen.overwrite)
    existing = None
    if not chosen.dummy_writer and check_output(target, chosen.overwrite):
        existing = read_plan(target)
    if chosen.resume and existing is None:
        raise ValueError(f"{output}: there is nothing to resume, as it has no plan")
    known_size = existing.configuration["partition_size"] if existing is not None else None
    size: int = chosen.partition_size or known_size or PARTITION_SIZE
    configuration |= {"input": shown(localized(os.fspath(source))), "partition_size": size}
    sieve = Sieve()
    items = None
    types: dict[str, str] = {}
    keep = check_keep(chosen.keep)
    if not chosen.resume:
        items = discover(
            source,
            chosen.column,
            allowed,
            sieve,
            chosen.skip_duplicates,
            chosen.id_column,
            keep,
        )
        items, found = settled(items, keep)
        types |= found
    elif existing is not None:  # whose types they are
        types = {name: existing.configuration["keep"].get(name, "new") for name in keep}
    configuration["keep"] = types
    batch_size = chosen.batch_size
    if existing is not None:
        _check_same(target, existing.configuration, configuration)
        if batch_size is None:
            batch_size = existing.configuration["batch_size"]
        if items is not None:
            _check_images(target, existing, _partitions(items, size))
    most = chosen.max_pixels
    limits = Limits(most, chosen.decode_seconds, chosen.worker_memory or memory_for(most))
    workers = chosen.workers or cores()
    return Job(
        target,
        configuration,
        items,
        batch_size,
        workers,
        chosen,
        allowed,
        limits,
        dict(sieve.skipped),
        store,
    )


def _check(options: Options) -> dict[str, Any]:
    """What options are of the plan's configuration; raises ValueError where one is wrong."""
    features = _check_features(options.features)
    for name, known in (
        ("dtype", DTYPES),
        ("format", FORMATS),
        ("on_error", ("record", "fail")),
    ):
        if (value := getattr(options, name)) not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    least_side(options.preset, options.scaled_decode)
    for what, number, least in (
        ("the batch size", options.batch_size, 1),
        ("the partition size", options.partition_size, 1),
        ("the number of workers", options.workers, 1),
        ("max_pixels", options.max_pixels, 1),
        ("the worker memory in MiB", options.worker_memory, 1),
        ("max_errors", options.max_errors, 0),
    ):
        if number is not None and number < least:
            raise ValueError(f"{what} must be at least {least}, got {number}")
    if not 0 < options.decode_seconds <= MOST_SECONDS:  # not a number is none
        raise ValueError(
            f"decode_seconds must be more than 0 and at most {MOST_SECONDS}, got "
            f"{options.decode_seconds}"
        )
    _, shares = options.share
    if options.overwrite and (options.resume or options.retry_failed or shares > 1):
        raise ValueError(
            "overwriting starts anew: it goes neither with resuming, nor with retrying, nor with a "
            "share of the partitions (overwrite with --plan-only, then start the shares)"
        )
    return {
        "column": options.column,
        "id_column": options.id_column,
        "preset": options.preset,
        "scaled_decode": options.scaled_decode,
        "features": features,
        "dtype": options.dtype,
        "format": options.format,
    }


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


def check_keep(names: Collection[str]) -> list[str]:
    """Names of what is carried along, in the order of the plan.

    Raises:
        ValueError: a name that there may not be.
    """
    if isinstance(names, str):
        raise ValueError(f"keep is a list of names, got {names!r}; put it into one")
    for name in names:
        if name in INDEX_COLUMNS:
            raise ValueError(
                f"the index has a column {name!r} of its own; rename that of the input to keep it"
            )
        if not KEPT_NAMES[1]([name]):
            raise ValueError(f"{name!r} cannot be the name of a column; rename it")
    if len(set(names)) > MOST_KEPT:
        raise ValueError(f"{len(set(names))} columns to keep, and {MOST_KEPT} are the most")
    return sorted(set(names))


def _check_place(source: str, output: str, store: Store | None) -> Path:
    """The folder of this machine that the output is made in."""
    place = localized(source)
    if store is not None:
        target, holds = store.here, f"{place.rstrip('/')}/".startswith(f"{store.address}/")
    else:
        target = Path(localized(output)).resolve()
        holds = not is_address(place) and Path(place).resolve().is_relative_to(target)
    if holds:
        raise ValueError(
            f"{shown(output)}: the output folder holds the input {shown(source)}; choose another"
        )
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


BACKEND = "backend"  # of the engine that a plan was made with: a fact, for another may go on


def decided(job: Job, engine: Encoder) -> dict[str, Any]:
    """What an engine decides of the plan: of its configuration, and its back end."""
    size = job.batch_size or engine.max_batch
    return {**identify(engine), "batch_size": size, BACKEND: engine.backend}


def make_plan(job: Job, engine: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a job: written, or the existing one if it is the same.

    Args:
        engine: by `decided`.
        facts: more to say in the plan, such as the repository of the weights.

    Raises:
        ValueError: the output was begun with another engine.
        StellarError: another run is writing an output that was to be overwritten; the plan cannot
            be written.
    """
    configuration = {**engine, **job.configuration}
    said = {**(facts or {}), BACKEND: configuration.pop(BACKEND)}
    partitions = _partitions(job.items or (), configuration["partition_size"])
    new = Plan(configuration, tuple(partitions), said)
    if not job.writes:
        return new
    with Locks(job.output) as locks, locks.planning():
        if job.options.overwrite and check_output(job.output, overwrite=False):
            locks.check_free()
            clear(job.output)
        if job.options.overwrite and job.store is not None:
            job.store.clear()
        if check_output(job.output, overwrite=False):
            existing = read_plan(job.output)
            _check_same(job.output, existing.configuration, configuration)
            if job.items is not None:
                _check_images(job.output, existing, partitions)
            return existing
        if job.items is None:
            raise StellarError(f"{job.output}: its plan has vanished since it was read")
        write_plan(job.output, new, job.items)
        if job.store is not None:
            job.store.put_plan()
    return new


def todo(job: Job, plan: Plan) -> tuple[Wanted, Mapping[int, Mapping[str, Any]]]:
    """The partitions of a job's share that are to be made, as `Pipeline.run` takes them, and the
    manifests of the others.

    Raises:
        StellarError: a complete partition is damaged or of another plan.
    """
    k, n = job.options.share
    mine = range(k - 1, len(plan.partitions), n)
    if not job.writes:
        return dict.fromkeys(mine), {}
    found = complete(job.output, plan, held=job.held)
    again = {i for i in found if job.options.retry_failed and found[i]["failed"]}
    wanted = {i: found.get(i) for i in mine if i not in found or i in again}
    return wanted, {i: found[i] for i in mine if i not in wanted}
