"""A whole extraction: by an engine in this process, or by one process a device.

However many processes there are, on however many machines, each makes what is free of one plan: see
`work`. They share nothing but the output folder.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from ..errors import StellarError
from ..leaving import leave
from ..printable import printable
from .job import BACKEND, decided, make_plan, todo
from .options import Job
from .output.folder import Locks, has_locks
from .output.layout import STATS, Plan, difference, read_manifest, write_json
from .stats import Progress, Summary
from .work.pipeline import Encoder, Pipeline, Stopped, Wanted
from .work.workers import cores, exit_of, without_interrupts, without_script

LOG_SECONDS = 30.0
# Seconds for the processes to drop their partitions when they are told to stop: one batch's work.
STOP_SECONDS = 120.0

AGAIN = "run the same command to go on"
GUARD = (
    "it imports the script, since that defines how to load the engine: the script must extract "
    "under `if __name__ == '__main__':`"
)

Load = Callable[..., Encoder]
# Of a process that works: ("report", images, failed images, seconds by stage) since the last one,
# and ("manifest", manifest) of each partition.
Tell = Callable[..., None]


def run(
    job: Job,
    engine: Encoder,
    *,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """Makes the partitions of a job that are not complete yet, and that no other run is making.

    Images that cannot be decoded are lines of the index with a reason; they take no row, and no
    place in a batch.

    Args:
        facts: more to say in `plan.json`, such as the repository of the weights.
        log_seconds: between lines of progress where there is no terminal.

    Raises:
        ValueError: the output was begun with another engine.
        StellarError: the output cannot be written, a feature does not fit its dtype, or images
            failed that may not. Partitions that are complete stay, and the same call goes on from
            there.
    """
    plan = make_plan(job, decided(job, engine), facts)
    with tallied(job, plan, log_seconds) as tally:
        if tally.wanted:
            work(job, plan, engine, tally.wanted, tally.told)
    return tally.summary


def work(
    job: Job,
    plan: Plan,
    engine: Encoder,
    wanted: Wanted,
    tell: Tell,
    stopped: Callable[[], bool] | None = None,
) -> None:
    """What every process of an extraction does: claims the next free partition by its lock, looks
    whether another one has made it meanwhile, makes it, and goes on until none is left.

    Args:
        wanted: partitions, see `todo`.
        stopped: whether to drop everything; asked now and then by several threads.

    Raises:
        Stopped: by `stopped`.
        StellarError: as `run`.
    """
    report = partial(tell, "report")
    with Pipeline(job, plan, engine, report=report, stopped=stopped) as pipeline:
        for manifest in pipeline.run(wanted):
            tell("manifest", manifest)
        report(0, 0, pipeline.timer.take())


def shares_of(job: Job, wanted: Wanted, count: int) -> list[Wanted]:
    """What each of `count` processes may make: everything, as they keep out of each other's way by
    locks; or a share, where that is not enough to have each partition made once."""
    if job.writes and has_locks(job.output) and not job.options.retry_failed:
        return [wanted] * count
    return [dict(list(wanted.items())[first::count]) for first in range(count)]


class Tally:
    """What was made so far, by whichever process."""

    def __init__(self, job: Job, plan: Plan, log_seconds: float) -> None:
        self.wanted, done = todo(job, plan)
        self.summary = Summary(workers=job.workers, skipped=job.skipped)
        self.left = set(self.wanted)
        self._most, self._failures = job.options.max_errors, 0
        for manifest in done.values():
            self.earlier(manifest)
        images = sum(plan.partitions[index].images for index in self.wanted)
        self.progress = Progress(images, log_seconds) if images else None

    def earlier(self, manifest: Mapping[str, Any]) -> None:
        self.summary.earlier_images += manifest["images"]
        self.summary.earlier_failed += manifest["failed"]

    def told(self, kind: str, *content: Any) -> None:
        """Takes what a process tells.

        Raises:
            StellarError: more images failed, of all processes together, than may.
        """
        if kind == "manifest":
            self.summary.count(content[0])
            self.left.discard(content[0]["partition"])
            return
        images, failed, seconds = content
        self.summary.add(seconds)
        if self.progress is not None:
            self.progress.update(images, failed, seconds)
        self._failures += failed
        if self._most is not None and self._failures > self._most:
            raise StellarError(
                f"{self._failures} images failed, more than --max-errors {self._most}"
            )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()


@contextmanager
def tallied(job: Job, plan: Plan, log_seconds: float) -> Iterator[Tally]:
    """Counts what is done in the block; `stats.json` is written whatever happens."""
    tally = Tally(job, plan, log_seconds)
    summary = tally.summary
    start = time.perf_counter()
    outcome = "complete"
    try:
        yield tally
        for index in sorted(tally.left):  # other runs have them
            manifest = read_manifest(job.output, plan, index, held=job.held)
            if manifest is None:
                summary.elsewhere += 1
            else:
                tally.earlier(manifest)
    except BaseException as error:
        outcome = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else f"error: {printable(str(error))}"
        )
        raise
    finally:
        tally.close()
        summary.seconds["total"] = time.perf_counter() - start
        if job.writes and (tally.wanted or outcome != "complete"):
            k, n = job.options.share
            name = STATS if n == 1 else f"stats-{k}-of-{n}.json"
            content = {
                "outcome": outcome,
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **summary.facts(),
            }
            try:
                with Locks(job.output) as locks, locks.planning():
                    write_json(job.output / name, content)
                    if job.store is not None:
                        job.store.put_file(name)
            except Exception:
                if outcome == "complete":  # or it would hide what went wrong
                    raise


def check_engine(name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises StellarError where an engine is not as expected: another precision on another kind of
    GPU, or other weights in a node's cache. Another back end is none: manifests say whose parts."""
    if changed := difference(expected, found, [name for name in found if name != BACKEND]):
        raise StellarError(
            f"the engine on {name} differs from the others: {', '.join(changed)}; give --precision "
            "and --batch-size, and the same weights to all"
        )


def portable(error: Exception) -> Exception:
    """An error that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StellarError(f"{type(error).__name__}: {error}")
    return error


# One process a device


def device_names(text: str | None) -> list[str | None]:
    """The devices named, with commas; if None, every GPU there is, or else the one that `load`
    chooses, as None.

    Raises:
        ValueError: no such device on this machine.
    """
    import torch

    from ..engine.backends import resolve_device

    if text is not None:
        return [str(resolve_device(name.strip())) for name in text.split(",")]

    count = torch.cuda.device_count()  # does not initialise CUDA in this process
    return [f"cuda:{index}" for index in range(count)] if count > 1 else [None]


def run_devices(
    job: Job,
    load: Load,
    devices: Sequence[str | None],
    *,
    facts: Mapping[str, Any] | None = None,
    log_seconds: float = LOG_SECONDS,
) -> Summary:
    """`run` by one process for each device.

    Args:
        load: called as `load(device=...)` in each process, and so picklable.

    Raises:
        As `run`, and what `load` raises.
        StellarError: a process died, or the engines differ.
    """
    with _processes(job, load, devices) as processes:
        engines = [process.receive() for process in processes]
        for process, engine in zip(processes, engines, strict=True):
            check_engine(process.name, engines[0], engine)
        plan = make_plan(job, engines[0], facts)
        with tallied(job, plan, log_seconds) as tally:
            tally.summary.engines = len(devices)
            if tally.wanted:
                shares = shares_of(job, tally.wanted, len(devices))
                for process, share in zip(processes, shares, strict=True):
                    process.link.send((plan, share))
                _follow(processes, tally)
    return tally.summary


def _follow(processes: Sequence[_Process], tally: Tally) -> None:
    """Counts what the processes tell, until all are done."""
    working = list(processes)
    while working:
        ready = connection.wait([process.link for process in working])
        for process in [process for process in working if process.link in ready]:
            message = process.receive()
            if message is None:
                working.remove(process)
            else:
                tally.told(*message)


@dataclass
class _Process:
    """A process of one device, as its parent has it."""

    name: str
    process: BaseProcess
    link: Connection
    remedy: str  # what to do if it dies

    def receive(self) -> Any:
        """What it tells next; None when it is done.

        Raises:
            StellarError: it died; and whatever it raised.
        """
        try:
            message = self.link.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise StellarError(
                f"the process for {self.name} died ({exit_of(self.process.exitcode)}); "
                f"{self.remedy}"
            ) from None
        self.remedy = AGAIN
        if isinstance(message, Exception):
            raise message
        return message


@contextmanager
def _processes(job: Job, load: Load, devices: Sequence[str | None]) -> Iterator[list[_Process]]:
    context = multiprocessing.get_context("spawn")
    workers = max(1, job.workers // len(devices))
    # The images are in the output folder, if there is one, and these may be millions.
    items = None if job.writes else job.items
    theirs = replace(job, items=items, workers=workers)
    threads = max(1, cores() // len(devices))
    # Only what the caller's script defines makes it necessary there.
    scripted = b"__main__" in bytes(ForkingPickler.dumps(load))
    started: list[_Process] = []
    try:
        for device in devices:
            mine, link = context.Pipe()
            process = context.Process(target=_main, args=(link, load, device, theirs, threads))
            with without_interrupts(), nullcontext() if scripted else without_script():
                process.start()
            link.close()
            started.append(_Process(str(device), process, mine, GUARD if scripted else AGAIN))
        yield started
    finally:
        for one in started:
            one.link.close()  # which stops it
        for one in started:
            one.process.join(STOP_SECONDS)
            one.process.kill()
            one.process.join()


def _main(*arguments: Any) -> None:
    """What a process of a device runs."""
    _serve(*arguments)
    leave()


def _serve(link: Connection, load: Load, device: str | None, job: Job, threads: int) -> None:
    """The process of one device, until nothing is left, or the parent closes the link."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def tell(*message: Any) -> None:
        link.send(message)

    with suppress(EOFError, ConnectionError):  # the parent is gone
        try:
            engine = load(device=device)
            if engine.device.type == "cpu":
                import torch

                torch.set_num_threads(threads)
            link.send(decided(job, engine))
            plan, wanted = link.recv()
            # Nothing more is sent: what can be read is the end.
            work(job, plan, engine, wanted, tell, stopped=link.poll)
            link.send(None)
        except (Stopped, EOFError, BrokenPipeError, ConnectionResetError):
            pass
        except Exception as error:
            link.send(portable(error))
