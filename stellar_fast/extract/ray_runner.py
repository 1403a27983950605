"""A whole extraction on a Ray cluster: one worker a GPU, or a node without GPUs.

A worker is a task that runs `runner.work`, as the processes of one machine do; neither pixels nor
features go through Ray. A worker or a node that dies is Ray's to replace, without end. What it was
at has no manifest, and is made again; what it had finished has one, and is left alone.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import StellarError
from .job import decided, make_plan
from .options import Job
from .output.layout import PLAN, Plan
from .ray_session import session
from .runner import LOG_SECONDS, Load, Tally, check_engine, portable, shares_of, tallied, work
from .stats import Summary
from .work.pipeline import Wanted

STOP_SECONDS = 60.0  # for workers to drop what they are at, once one of them has failed
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Share:
    """What one engine takes of the cluster; `cpus` is 0 where a node has fewer cores than GPUs."""

    engines: int
    cpus: int
    gpus: int


def run(
    job: Job,
    load: Load,
    *,
    address: str | None = None,
    engines: int | None = None,
    workers: int | None = None,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """`runner.run` by engines on a Ray cluster.

    Input and output must be where every node sees them under the same name; the output's file
    system should have locks.

    Args:
        load: called as `load(device=None)` in a process for each engine, and so picklable; Ray
            shows it its own GPU alone.
        address: of the cluster, as `ray.init` takes it; "local" or None for this machine alone. A
            session of Ray that this process already has is used as it is.
        engines: how many; one for each GPU of the cluster if left out, or where there are none, one
            for each node. Without GPUs, they share the cores.
        workers: decoding processes of each engine; as many as it has cores if left out.
        facts, log_seconds: as for `runner.run`.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: `engines` or `workers` is not positive, the cluster has not so many GPUs or
            cores, or the job has a dummy writer or an output in a store; and as `runner.run`.
        StellarError: the engines differ, or one does not see the output; and as
            `runner.run`.
        ConnectionError: there is no cluster at `address`.
    """
    if not job.writes:
        raise ValueError("a dummy writer measures one machine; leave Ray out")
    if job.store is not None:
        raise ValueError(
            "Ray's processes share an output by its locks, which a store has not: give a folder "
            "that every node sees, or one command a machine, each with --partitions K/N"
        )
    for name, count in (("engines", engines), ("workers", workers)):
        if count is not None and count < 1:
            raise ValueError(f"the number of {name} must be at least 1, got {count}")
    with session(address), _told():
        share = _share_out(engines)
        workers = workers or max(1, share.cpus)
        # Without the images: the output folder has them, and these may be millions.
        theirs = replace(job, items=None, workers=workers)
        takes = "a GPU" if share.gpus else f"{share.cpus} core{'s' * (share.cpus > 1)}"
        _say(f"waiting for Ray to start a process with {takes}, and to load the model")
        plan = make_plan(job, _answer_of(_remote(share, _decided, theirs, load)), facts)
        told = replace(job, workers=workers * share.engines)
        with tallied(told, plan, log_seconds) as tally:
            tally.summary.engines = share.engines
            if tally.wanted:
                _say(f"waiting for {share.engines} processes to load it")
                _run(theirs, plan, load, share, tally)
    return tally.summary


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _told() -> Iterator[None]:
    """What Ray itself raises becomes one line: no process can start, the cluster is lost."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        (*_, last) = str(error).strip().splitlines()
        raise StellarError(
            f"Ray gave up ({type(error).__name__}): {last.strip()}; every node needs this "
            "stellar-fast and what it depends on. What is complete stays: run again to go on"
        ) from error


def _share_out(engines: int | None) -> _Share:
    """How many engines, and what each takes, so that all of them fit on the nodes there are."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if sum(gpus):
        most = sum(gpus)
        # Of the node with the fewest cores a GPU: an engine must fit on any of them.
        each = min(cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu)
        kind, taken = "GPUs", 1
    else:
        most, kind, taken = sum(cpus), "cores", 0
        wanted = engines or sum(cpu > 0 for cpu in cpus)
        # The largest share of which the nodes hold so many.
        shares = range(max(cpus), 0, -1)
        each = next((n for n in shares if sum(cpu // n for cpu in cpus) >= wanted), 0)
        engines = wanted
    engines = engines or most
    if engines > most or not engines:
        raise ValueError(f"{engines} engines, but the Ray cluster has {most} {kind}")
    return _Share(engines, each, taken)


def _remote(share: _Share, function: Callable[..., Answer], *arguments: Any) -> Any:
    """Starts a function where there is room for an engine, in a process of its own: the promise of
    its answer, or of the error that it raised."""
    import ray

    def call(*given: Any) -> Answer | Exception:
        try:
            return function(*given)
        except Exception as error:
            return portable(error)

    # A process or a node that dies is replaced; a GPU's memory is free when the process has ended.
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_calls=1, max_retries=-1)(call)
    return task.remote(*arguments)


def _answer_of(task: Any) -> Any:
    import ray

    answer = ray.get(task)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _decided(job: Job, load: Load) -> dict[str, Any]:
    return decided(job, load(device=None))


def _run(job: Job, plan: Plan, load: Load, share: _Share, tally: Tally) -> None:
    import ray
    from ray.util.queue import Queue

    told = Queue(actor_options={"num_cpus": 0})
    given = shares_of(job, tally.wanted, share.engines)
    tasks = [_remote(share, _work, job, plan, load, wanted, share, told.put) for wanted in given]
    left = list(tasks)
    try:
        while left:
            done, left = ray.wait(left, timeout=0.5)
            for message in told.get_nowait_batch(told.qsize()):
                tally.told(*message)
            for task in done:
                _answer_of(task)
    except BaseException:
        for task in tasks:
            ray.cancel(task)  # as Ctrl-C would
        ray.wait(tasks, num_returns=len(tasks), timeout=STOP_SECONDS)
        raise


def _work(
    job: Job,
    plan: Plan,
    load: Load,
    wanted: Wanted,
    share: _Share,
    put: Callable[[tuple[Any, ...]], None],
) -> None:
    """What the process of an engine does."""
    if not (job.output / PLAN).is_file():
        raise StellarError(
            f"{job.output} is not to be seen from a node of the Ray cluster: it must be on a file "
            "system that all of them share"
        )
    engine = load(device=None)
    check_engine(platform.node(), plan.configuration, decided(job, engine))
    if engine.device.type == "cpu":
        import torch

        torch.set_num_threads(max(1, share.cpus))
    seconds: Counter[str] = Counter()

    def tell(kind: str, *content: Any) -> None:
        """Whole partitions alone: one that is made again was never counted."""
        if kind == "report":
            seconds.update(content[2])
            return
        (manifest,) = content
        put(("manifest", manifest))
        put(("report", manifest["images"], manifest["failed"], dict(seconds)))
        seconds.clear()

    work(job, plan, engine, wanted, tell)
