"""What `stellar-fast extract` does, in steps that the command line and Python share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .extract import precision as precisions
from .extract import runner
from .extract.features import Features, open_features
from .extract.job import make_job
from .extract.options import Job
from .extract.records import PathLike
from .extract.runner import LOG_SECONDS, Load
from .extract.stats import Summary

if TYPE_CHECKING:
    from .engine.engine import Engine


def extract_features(
    input: PathLike,
    output: PathLike,
    model: str | Engine = "stellar-b16",
    *,
    repo: str | None = None,
    weights: Literal["pretrained", "synthetic"] = "pretrained",
    precision: str = "auto",
    devices: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> Features:
    """Extracts features of many images, as `stellar-fast extract` does: the opened output.

    A call that was stopped is gone on with by the same call, as is one that is complete already,
    which then reads what is there. It may stand in a notebook, and at the top of a script: the
    processes that it starts import no script.

    Args:
        input: images, see `extract.input.discover`.
        output: the folder to make, or to go on with.
        model: a model of `list_models()`, or of `repo`; or an engine, which then has all of
            `repo`, `weights`, `precision`, `devices`, `revision` and `local_files_only`.
        devices: as of the command, "cuda:0,cuda:1"; every GPU there is, if left out.
        options: the fields of `extract.Options`, which are the command's.

    Raises:
        TypeError: an option that there is not.
        ValueError: an argument that cannot be right; no images; an output that was begun otherwise.
        DownloadError, CheckpointError: the weights cannot be had or read.
        StellarError: the output cannot be written, or images failed that may not. Images that
            failed are otherwise in `failed` of what is returned.
    """
    if options.get("dummy_writer"):
        raise ValueError("a dummy writer leaves no features to open; it is the command's")
    if isinstance(model, str):
        from .loading import PUBLISHED_REPO, load

        loading: Load = functools.partial(
            load,
            model,
            repo=repo or PUBLISHED_REPO,
            weights=weights,
            revision=revision,
            local_files_only=local_files_only,
        )
        job, loading = prepared(input, output, loading, precision, lambda said: None, options)
        told = facts_of(repo, revision, weights)
        summary = carried_out(job, loading, devices=devices, facts=told)
    else:
        given = (repo, weights, precision, devices, revision, local_files_only)
        if given != (None, "pretrained", "auto", None, None, False):
            raise ValueError("an engine has its weights, precision and device: leave them out")
        job = make_job(input, output, **options)
        summary = runner.run(job, model)
    _, shares = job.options.share
    return open_features(job.output, allow_incomplete=shares > 1 or summary.elsewhere > 0)


def prepared(
    input: PathLike,
    output: PathLike,
    load: Load,
    precision: str,
    say: Callable[[str], None],
    options: Mapping[str, Any],
) -> tuple[Job, Load]:
    """A checked extraction, and what loads its engine on a device.

    Args:
        load: of keywords as `stellar_fast.load` has them, but for those of the extraction.
        say: is told what int8's scales come from.
    """
    job = make_job(input, output, **options)
    precision = precisions.planned(job, precision)
    load = functools.partial(load, precision=precision, max_batch=job.batch_size)
    if precision == "int8":
        load = precisions.with_scales(job, load, say)
    return job, load


def facts_of(repo: str | None, revision: str | None, weights: str) -> dict[str, Any]:
    """What a plan says of the weights, beside their digest."""
    return {"repo": repo, "revision": revision} if weights != "synthetic" else {}


def carried_out(
    job: Job,
    load: Load,
    *,
    devices: str | None = None,
    ray: str | None = None,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """Runs an extraction: in this process, by one process a device, or on a Ray cluster.

    Args:
        devices: names with commas; every GPU there is, if left out.
        ray: the cluster's address.
    """
    told: dict[str, Any] = {"facts": facts, "log_seconds": log_seconds}
    if ray is not None:
        if devices is not None:
            raise ValueError("--ray gives each engine its device; leave --devices out")
        from .extract import ray_runner

        return ray_runner.run(job, load, address=ray, workers=job.options.workers, **told)
    names = runner.device_names(devices)
    if len(names) == 1:
        return runner.run(job, load(device=names[0]), **told)
    return runner.run_devices(job, load, names, **told)
