"""A whole extraction on one machine: by an engine in this process, or by one process a device."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..printable import printable
from .devices import Crew
from .job import Job, identify, items_of, prepare, todo
from .output.layout import STATS, Plan, write_json
from .stats import Progress, Summary
from .work.pipeline import Encoder, Pipeline

LOG_SECONDS = 30.0


def run(
    job: Job,
    engine: Encoder,
    *,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """Makes the partitions of a job that are not complete yet.

    Images that cannot be decoded are lines of the index with a reason; they take no row, and no
    place in a batch.

    Args:
        facts: more to say in `plan.json`, such as the repository of the weights.
        log_seconds: between lines of progress where there is no terminal.

    Raises:
        ValueError: the output was begun with another engine.
        StellarError: the output cannot be written, a feature does not fit its dtype, another run is
            at the same partitions, or images failed that may not. Partitions that are complete
            stay, and the same call goes on from there.
    """
    made = prepare(job, identify(engine), engine.max_batch, facts)
    with summarized(job, made, log_seconds) as (indices, summary, progress):
        if not indices:
            return summary
        items = partial(items_of, job) if job.options.dummy_writer else None
        output = None if job.options.dummy_writer else job.output

        def report(images: int, failed: int, seconds: Mapping[str, float]) -> None:
            summary.add(seconds)
            progress.update(images, failed, seconds)

        with Pipeline(output, made, engine, job.options, items=items, report=report) as pipeline:
            for manifest in pipeline.run(indices):
                summary.count(manifest)
            summary.add(pipeline.timer.take())
    return summary


def run_devices(
    job: Job,
    load: Callable[..., Encoder],
    devices: Sequence[str | None],
    *,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """`run` by one process for each device, which share the partitions.

    Args:
        load: called as `load(device=...)` in each process, and so picklable.

    Raises:
        As `run`, and what `load` raises.
        StellarError: a process died.
    """
    with Crew(job, load, devices) as crew:
        identity, batch_size = crew.identity()
        made = prepare(job, identity, batch_size, facts)
        with summarized(job, made, log_seconds) as (indices, summary, progress):
            summary.engines = len(devices)
            if indices:
                crew.run(made, indices, summary, progress)
        return summary


@contextmanager
def summarized(
    job: Job, made: Plan, log_seconds: float
) -> Iterator[tuple[list[int], Summary, Progress]]:
    """What is to be done, and places to count it; `stats.json` is written whatever happens."""
    indices, done = todo(job, made)
    summary = Summary(workers=job.options.workers, skipped=job.skipped)
    for manifest in done.values():
        summary.earlier_images += manifest["images"]
        summary.earlier_failed += manifest["failed"]
    images = sum(made.partitions[index].images for index in indices)
    progress = Progress(images, log_seconds)
    start = time.perf_counter()
    outcome = "complete"
    try:
        yield indices, summary, progress
    except BaseException as error:
        outcome = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else f"error: {printable(str(error))}"
        )
        raise
    finally:
        progress.close()
        summary.seconds["total"] = time.perf_counter() - start
        if not job.options.dummy_writer and (indices or outcome != "complete"):
            k, n = job.share
            name = STATS if n == 1 else f"stats-{k}-of-{n}.json"
            content = {
                "outcome": outcome,
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **summary.facts(),
            }
            try:
                write_json(job.output / name, content)
            except Exception:
                if outcome == "complete":  # or it would hide what went wrong
                    raise
