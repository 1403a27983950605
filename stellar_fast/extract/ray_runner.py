"""A whole extraction on a Ray cluster, by Ray Data: one actor a GPU, or a node without GPUs.

The same partitions as without Ray, each made whole by one actor, which writes it and sends back its
manifest; neither pixels nor features go through Ray. An actor or a node that dies is Ray's to
replace (Ray Data restarts actors and repeats their tasks without end). What it was at has no
manifest, and is made again; what it had finished has one, and is only read.
"""

from __future__ import annotations

import json
import logging
import pickle
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import StellarError
from .devices import portable
from .job import Job, identify, prepare
from .output.folder import Locks
from .output.layout import PLAN, Partition, Plan, difference, read_manifest, read_plan
from .ray_session import session
from .runner import LOG_SECONDS, summarized
from .stats import Progress, Summary
from .work.pipeline import Encoder, Pipeline

Load = Callable[..., Encoder]

STOP_SECONDS = 60.0  # for actors to end, once one of them has failed


@dataclass(frozen=True)
class _Share:
    """What one actor takes of the cluster; `cpus` is 0 where a node has fewer cores than GPUs."""

    actors: int
    cpus: int
    gpus: int


def run(
    job: Job,
    load: Load,
    *,
    address: str | None = None,
    actors: int | None = None,
    workers: int | None = None,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """`runner.run` by actors of a Ray cluster.

    Input and output must be where every node sees them under the same name; the output's file
    system should have locks.

    Args:
        load: called as `load(device=None)` in each actor, and so picklable; Ray shows an actor its
            own GPU alone.
        address: of the cluster, as `ray.init` takes it; "local" or None for this machine alone. A
            session of Ray that this process already has is used as it is.
        actors: how many; one for each GPU of the cluster if left out, or where there are none, one
            for each node. Without GPUs, they share the cores.
        workers: decoding processes of each actor; as many as it has cores if left out.
        facts, log_seconds: as for `runner.run`.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: `actors` or `workers` is not positive, the cluster has not so many GPUs or
            cores, or the job has a dummy writer; and as `runner.run`.
        StellarError: the actors' engines differ, or an actor does not see the output; and as
            `runner.run`.
        ConnectionError: there is no cluster at `address`.
    """
    if job.options.dummy_writer:
        raise ValueError("a dummy writer measures one machine; leave Ray out")
    for name, count in (("actors", actors), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"the number of {name} must be at least 1, got {count}")
    with session(address), _told():
        share = _share_out(actors)
        workers = workers or max(1, share.cpus)
        identity, batch_size = _identity(load, share)
        made = prepare(job, identity, batch_size, facts)
        told = replace(job, options=replace(job.options, workers=workers * share.actors))
        with summarized(told, made, log_seconds) as (indices, summary, progress):
            summary.engines = share.actors
            # Without the images: the output folder has them, and every actor gets a copy of this.
            mine = replace(job, items=None, options=replace(job.options, workers=workers))
            maker = _Maker(mine, load, share)
            if indices:
                _run(job, made, indices, maker, summary, progress)
    return summary


@contextmanager
def _told() -> Iterator[None]:
    """What Ray itself raises becomes one line: actors that cannot start, a cluster that is lost."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        (*_, last) = str(error).strip().splitlines()
        raise StellarError(
            f"Ray gave up ({type(error).__name__}): {last.strip()}; every node needs this "
            "stellar-fast and what it depends on. What is complete stays: run again to go on"
        ) from error


def _share_out(actors: int | None) -> _Share:
    """How many actors, and what each takes, so that all of them fit on the nodes there are."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if sum(gpus):
        most = sum(gpus)
        # Of the node with the fewest cores a GPU: an actor must fit on any of them.
        each = min(cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu)
        kind, taken = "GPUs", 1
    else:
        most, kind, taken = sum(cpus), "cores", 0
        wanted = actors or sum(cpu > 0 for cpu in cpus)
        # The largest share of which the nodes hold so many.
        shares = range(max(cpus), 0, -1)
        each = next((n for n in shares if sum(cpu // n for cpu in cpus) >= wanted), 0)
        actors = wanted
    actors = actors or most
    if actors > most or not actors:
        raise ValueError(f"{actors} actors, but the Ray cluster has {most} {kind}")
    return _Share(actors, each, taken)


def _identity(load: Load, share: _Share) -> tuple[dict[str, Any], int]:
    """What the engine is, and its `max_batch`: found out by loading it where it will run."""
    import ray

    def find() -> tuple[dict[str, Any], int] | Exception:
        try:
            engine = load(device=None)
            return identify(engine), engine.max_batch
        except Exception as error:
            return portable(error)

    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_calls=1)(find)
    found = ray.get(task.remote())
    if isinstance(found, Exception):
        raise found
    return found


def _run(
    job: Job,
    made: Plan,
    indices: Sequence[int],
    maker: _Maker,
    summary: Summary,
    progress: Progress,
) -> None:
    import ray.data

    share = maker.share
    rows = [{"partition": index} for index in indices]
    with _quiet_data():
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(maker,),
            batch_size=1,
            # A partition that waits at a busy actor cannot go to an idle one.
            compute=ray.data.ActorPoolStrategy(
                size=min(share.actors, len(rows)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        answers = (answer for answer in results.iter_rows())
        try:
            _count(answers, job.options.max_errors, summary, progress)
        except BaseException:
            answers.close()  # has Ray stop the actors, without waiting for their end
            _wait_for_end(job.output, [made.partitions[index] for index in indices])
            raise


def _wait_for_end(output: Path, partitions: Iterable[Partition]) -> None:
    """Returns when no actor writes any of these, so that a next run finds them free.

    Or after `STOP_SECONDS`: what is still written then, a next run refuses by name.
    """
    deadline = time.monotonic() + STOP_SECONDS
    with Locks(output) as locks:
        for partition in partitions:
            while time.monotonic() < deadline:
                try:
                    locks.take(partition)
                except StellarError:
                    time.sleep(0.05)
                else:
                    locks.release(partition)
                    break


def _count(
    answers: Iterable[Mapping[str, Any]], most: int | None, summary: Summary, progress: Progress
) -> None:
    """Adds up the actors' answers; raises the first error, and StellarError if more than `most`
    images failed."""
    failures = 0
    for answer in answers:
        if answer["error"]:
            raise pickle.loads(answer["error"])
        manifest, seconds = json.loads(answer["manifest"]), json.loads(answer["seconds"])
        summary.count(manifest)
        summary.add(seconds)
        progress.update(manifest["images"], manifest["failed"], seconds)
        failures += manifest["failed"]
        if most is not None and failures > most:
            raise StellarError(f"{failures} images failed, more than --max-errors {most}")


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Without Ray Data's own bars and reports: there is `Progress`."""
    from ray.data import DataContext

    logger = logging.getLogger("ray.data")
    context, level = DataContext.get_current(), logger.level
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


@dataclass(frozen=True)
class _Maker:
    """What an actor is made of."""

    job: Job
    load: Load
    share: _Share


class _Actor:
    """Makes the partition that it is given, and answers with its manifest or an error."""

    def __init__(self, maker: _Maker) -> None:
        self._maker = maker
        self._pipeline: Pipeline | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (index,) = batch["partition"]
        manifest: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        error = b""
        try:
            manifest, seconds = self._make(int(index))
        except Exception as raised:
            self._close()
            error = pickle.dumps(portable(raised))
        return {
            "manifest": [json.dumps(manifest)],
            "seconds": [json.dumps(seconds)],
            "error": [error],
        }

    def _make(self, index: int) -> tuple[dict[str, Any], dict[str, float]]:
        job = self._maker.job
        made = _planned(job)
        done = read_manifest(job.output, made, index)
        # A task that is repeated because the actor died after it had finished.
        if done is not None and not (job.options.retry_failed and done["failed"]):
            return done, {}
        pipeline = self._pipeline or self._open(made)
        (manifest,) = pipeline.run([index])
        return manifest, pipeline.timer.take()

    def _open(self, made: Plan) -> Pipeline:
        job, share = self._maker.job, self._maker.share
        engine = self._maker.load(device=None)
        found = {**identify(engine), "batch_size": job.batch_size or engine.max_batch}
        # Another precision on another kind of GPU, or other weights in a node's cache.
        if changed := difference(made.configuration, found, list(found)):
            raise StellarError(
                f"the engine on {platform.node()} differs from the plan's: {', '.join(changed)}; "
                "give --precision and --batch-size, and the same weights to every node"
            )
        if engine.device.type == "cpu":
            import torch

            torch.set_num_threads(max(1, share.cpus))
        self._pipeline = Pipeline(job.output, made, engine, job.options).__enter__()
        return self._pipeline

    def _close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def __del__(self) -> None:
        self._close()


def _planned(job: Job) -> Plan:
    try:
        return read_plan(job.output)
    except StellarError as error:
        if (job.output / PLAN).exists():
            raise
        raise StellarError(
            f"{job.output} is not to be seen from a node of the Ray cluster: it must be on a file "
            f"system that all of them share ({error})"
        ) from error
