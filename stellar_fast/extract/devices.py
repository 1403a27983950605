"""One process for each device, all of them working on the partitions of one plan."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from ..errors import StellarError
from .job import Job, identify, items_of
from .output.layout import Plan
from .records import Item
from .stats import Progress, Summary
from .work.pipeline import Encoder, Pipeline, Stopped
from .work.workers import cores, exit_of, without_interrupts

# Seconds for the processes to drop their partitions when they are told to stop: one batch's work.
STOP_SECONDS = 120.0


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


class Crew:
    """Processes that each load an engine, and make the partitions that they are handed."""

    def __init__(
        self, job: Job, load: Callable[..., Encoder], devices: Sequence[str | None]
    ) -> None:
        self._job = job
        workers = max(1, job.options.workers // len(devices))
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, Any] = {}
        self._names: dict[Connection, str | None] = {}
        self._ended: set[Connection] = set()
        for device in devices:
            mine, theirs = context.Pipe()
            arguments = (
                theirs,
                load,
                device,
                replace(job, items=None, options=replace(job.options, workers=workers)),
                max(1, cores() // len(devices)),
            )
            process = context.Process(target=_serve, args=arguments, name=f"extract-{device}")
            with without_interrupts():
                process.start()
            theirs.close()
            self._processes[mine], self._names[mine] = process, device

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for mine in self._processes:
            mine.close()  # the process then stops by itself
        for process in self._processes.values():
            process.join(STOP_SECONDS)
            process.kill()
            process.join()

    def identity(self) -> tuple[dict[str, Any], int]:
        """What the engines are, by `identify`, and their `max_batch`, when all are loaded.

        Raises:
            StellarError: they differ, or a process died; and whatever an engine's loading raised.
        """
        found: dict[tuple[str | None, Connection], tuple[Any, ...]] = {}
        while len(found) < len(self._processes):
            for mine, (kind, *content) in self._messages():
                if kind == "ready":
                    found[self._names[mine], mine] = tuple(content)
        (first, *others) = found.items()
        for (name, _), other in others:
            if other != first[1]:
                raise StellarError(
                    f"the engines differ between {first[0][0]} and {name}: {first[1]}, {other}; "
                    "give --precision and --batch-size, or fewer --devices"
                )
        return first[1]

    def run(self, made: Plan, indices: Sequence[int], summary: Summary, progress: Progress) -> None:
        """Hands out partitions until all are complete.

        Raises:
            StellarError: a process died; and whatever a process raised.
        """
        left = deque(indices)
        most = self._job.options.max_errors
        failures = 0
        for mine in self._processes:
            mine.send(("plan", made))
        while len(self._ended) < len(self._processes):
            for mine, (kind, *content) in self._messages():
                if kind == "next":
                    index = left.popleft() if left else None
                    mine.send(("make", index, self._items(made, index)))
                elif kind == "report":
                    images, failed, seconds = content
                    summary.add(seconds)
                    progress.update(images, failed, seconds)
                    failures += failed
                    if most is not None and failures > most:
                        raise StellarError(
                            f"{failures} images failed, more than --max-errors {most}"
                        )
                elif kind == "manifest":
                    summary.count(content[0])
                else:
                    assert kind == "done"
                    summary.add(content[0])
                    self._ended.add(mine)

    def _items(self, made: Plan, index: int | None) -> list[Item] | None:
        """The images, where nothing that is written has them."""
        if index is None or not self._job.options.dummy_writer:
            return None
        return items_of(self._job, made.partitions[index])

    def _messages(self) -> Iterator[tuple[Connection, tuple[Any, ...]]]:
        awaited = [mine for mine in self._processes if mine not in self._ended]
        for ready in connection.wait(awaited):
            assert isinstance(ready, Connection)
            try:
                message = ready.recv()
            except (EOFError, ConnectionError):
                process = self._processes[ready]
                process.join()
                raise StellarError(
                    f"the process for {self._names[ready]} died ({exit_of(process.exitcode)}); "
                    "run the same command to go on"
                ) from None
            if message[0] == "error":
                raise message[1]
            yield ready, message


def _serve(
    link: Connection, load: Callable[..., Encoder], device: str | None, job: Job, threads: int
) -> None:
    """The process of one device, until it is told that nothing is left or the link is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        _work(_Link(link), load, device, job, threads)
    except Stopped:
        pass
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except Exception as error:
        with suppress(OSError):
            link.send(("error", portable(error)))
        sys.exit(1)


def portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StellarError(f"{type(error).__name__}: {error}")
    return error


class _Link:
    """A connection that several threads send to."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._lock = threading.Lock()
        self.recv = link.recv

    def send(self, *message: Any) -> None:
        with self._lock:
            self._link.send(message)


def _work(
    link: _Link, load: Callable[..., Encoder], device: str | None, job: Job, threads: int
) -> None:
    import torch

    engine = load(device=device)
    if engine.device.type == "cpu":
        torch.set_num_threads(threads)
    link.send("ready", identify(engine), engine.max_batch)
    _, made = link.recv()
    given: dict[int, list[Item]] = {}
    orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def indices() -> Iterator[int]:
        while True:
            link.send("next")
            index = orders.get()
            if index is None:
                return
            yield index

    def report(images: int, failed: int, seconds: Mapping[str, float]) -> None:
        link.send("report", images, failed, seconds)

    writes = not job.options.dummy_writer
    with Pipeline(
        job.output if writes else None,
        made,
        engine,
        job.options,
        items=None if writes else lambda partition: given.pop(partition.index),
        report=report,
    ) as pipeline:

        def receive() -> None:
            try:
                while True:
                    _, index, items = link.recv()
                    if items is not None:
                        given[index] = items
                    orders.put(index)
            except (EOFError, OSError):
                pipeline.stop()
                orders.put(None)  # whoever waits for an order gets none

        threading.Thread(target=receive, daemon=True).start()
        for manifest in pipeline.run(indices()):
            link.send("manifest", manifest)
        link.send("done", pipeline.timer.take())
