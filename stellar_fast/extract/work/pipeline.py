"""Partitions through one engine: decoding processes before it, a thread that writes behind it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import StellarError
from ..options import Job
from ..output.folder import BusyError, Locks
from ..output.layout import Plan, read_items
from ..output.partition import Unwritten, Work
from ..records import Item
from ..stats import Timer
from .decoding import SHAPE, Outcome, pixels_dtype
from .workers import Workers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...config import ModelConfig
    from .copies import Moving

# Batches that wait for the engine, and for the writer.
BATCHES_AHEAD = 2
POLL = 0.2  # seconds between looks at whether another thread has stopped the pipeline

Report = Callable[[int, int, Mapping[str, float]], None]
Wanted = Mapping[int, Mapping[str, Any] | None]  # see `Pipeline.run`


class Encoder(Protocol):
    """What extraction needs of an `Engine`."""

    config: ModelConfig
    device: torch.device
    precision: str
    backend: str
    weights: str
    weights_sha256: str | None  # of the file that they were loaded from
    max_batch: int

    def encode(
        self, images: Any, *, outputs: Collection[str] | None = ...
    ) -> dict[str, Tensor]: ...


class Stopped(Exception):
    """The pipeline was stopped by `Pipeline.stop`."""


@dataclass
class _Batch:
    work: Work | Unwritten
    ids: Sequence[str]
    buffer: Tensor
    moving: Moving
    failed: int  # images that failed since the batch before


@dataclass
class _End:
    """All images of a partition were handed on."""

    work: Work | Unwritten
    failed: int


class Pipeline:
    """One engine with its decoding processes, for any number of partitions.

    Memory is bounded: two batches wait in shared memory, two for the engine and two for the writer.
    """

    def __init__(
        self,
        job: Job,
        plan: Plan,
        engine: Encoder,
        *,
        report: Report | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            plan: in the job's output, if it has one.
            report: is called with the images and the failed images finished since its last call,
                and the seconds of each stage since then.
            stopped: is asked now and then, by several threads, whether to stop.

        Raises:
            StellarError: the output cannot be written, or no process can be started.
        """
        import torch

        from .copies import Copies

        self.timer = Timer()
        self._job, self._options = job, job.options
        self._plan, self._engine, self._report = plan, engine, report
        configuration = plan.configuration
        self._batch_size: int = configuration["batch_size"]
        self._features: list[str] = configuration["features"]
        nothing = torch.zeros((0, *SHAPE), dtype=torch.uint8, device="cpu")
        none = engine.encode(nothing, outputs=self._features)
        self._shapes = {name: tuple(none[name].shape[1:]) for name in self._features}
        self._copies = Copies(engine.device)
        self._buffers: queue.Queue[Tensor] = queue.Queue()
        dtype = pixels_dtype(configuration["preset"])
        # One is filled, others wait, and others are encoded.
        try:
            for _ in range(BATCHES_AHEAD + 2 + self._copies.ahead):
                self._buffers.put(self._copies.buffer(self._batch_size, dtype))
        except (RuntimeError, MemoryError) as error:
            raise StellarError(
                f"not enough memory for batches of {self._batch_size} images; give a smaller "
                "--batch-size"
            ) from error
        self._stop = threading.Event()
        self._stopped = stopped
        self._error: BaseException | None = None
        self._made: dict[str, Any] = {
            "device": str(engine.device),
            "backend": engine.backend,
            "limits": asdict(job.limits),
        }
        self._failures = 0
        self._locks = Locks(job.output) if job.writes else None
        try:
            self._workers = Workers(
                job.workers,
                configuration["preset"],
                self._batch_size,
                scaled_decode=configuration["scaled_decode"],
                dummy=job.options.dummy_reader,
                allowed=job.allowed,
                limits=job.limits,
            )
        except BaseException:
            self._close_locks()
            raise

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decoding processes."""
        self._stop.set()
        self._workers.close()
        self._close_locks()

    def _close_locks(self) -> None:
        if self._locks is not None:
            self._locks.__exit__()

    def stop(self) -> None:
        """Makes `run` drop what it is at and raise `Stopped`; from any thread."""
        self._stop.set()

    @property
    def pids(self) -> list[int]:
        """Of the decoding processes."""
        return self._workers.pids

    def run(self, wanted: Wanted) -> Generator[dict[str, Any], None, None]:
        """Makes partitions, one after another without a pause between them: their manifests.

        Those that another process has locked, or has made meanwhile, are left to it. When this
        raises, or is closed, partitions that are not complete are dropped, and the pipeline is of
        no more use.

        Args:
            wanted: by partition, its manifest if it is complete, and to be made again for the
                images that failed.

        Raises:
            StellarError: the output cannot be written, a feature does not fit its dtype, or images
                failed that may not.
            Stopped: by `stop` or `stopped`.
        """
        self._check()
        self._feed: queue.Queue[_Batch | _End | None] = queue.Queue(BATCHES_AHEAD)
        self._written: queue.Queue[tuple[_Batch, Moving] | _End | None] = queue.Queue(BATCHES_AHEAD)
        self._manifests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._open: list[Work | Unwritten] = []
        threads = [
            threading.Thread(target=self._guarded, args=(target, *arguments), name=name)
            for name, target, *arguments in (
                ("feed", self._decode, wanted),
                ("write", self._write),
            )
        ]
        for thread in threads:
            thread.start()
        whole = False
        try:
            for _ in self._encode():
                while not self._manifests.empty():
                    yield self._manifests.get()
            whole = True
        finally:
            if not whole:
                self._stop.set()
            for thread in threads:
                thread.join()
            for work in self._open:
                work.drop()
        self._check()
        while not self._manifests.empty():
            yield self._manifests.get()

    def _guarded(self, target: Callable[..., None], *arguments: Any) -> None:
        try:
            target(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            if self._error is None:
                self._error = error
            self._stop.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._is_stopped():
            raise Stopped

    def _is_stopped(self) -> bool:
        return self._stop.is_set() or (self._stopped is not None and self._stopped())

    def _put(self, lane: queue.Queue[Any], thing: Any) -> None:
        while True:
            self._check()
            with suppress(queue.Full):
                return lane.put(thing, timeout=POLL)

    def _get(self, lane: queue.Queue[Any]) -> Any:
        while True:
            self._check()
            with suppress(queue.Empty):
                return lane.get(timeout=POLL)

    # The thread before the engine

    def _decode(self, wanted: Wanted) -> None:
        """Puts full batches of good images into `_feed`, and the end of every partition."""
        works: deque[Work | Unwritten] = deque()

        def items() -> Iterator[Item]:
            for work in self._claimed(wanted):
                works.append(work)
                yield from work.items

        buffer: Tensor = self._get(self._buffers)
        ids: list[str] = []
        failed = 0

        def flush(work: Work | Unwritten) -> None:
            nonlocal buffer, ids, failed
            moving = self._copies.up(buffer[: len(ids)])
            self._put(self._feed, _Batch(work, ids, buffer, moving, failed))
            buffer, ids, failed = self._get(self._buffers), [], 0

        for outcome in self._workers.decode(items(), self._is_stopped):
            work = works[0]
            item = work.items[len(work.reasons)]
            work.add(outcome)
            self.timer.seconds["read"] += outcome.read
            self.timer.seconds["decode"] += outcome.decode
            if outcome.reason is not None:
                failed += 1
                self._count_failure(item, outcome)
            else:
                buffer[len(ids)].numpy()[:] = self._workers.slots.array[outcome.slot]
                ids.append(item.id)
            last = len(work.reasons) == len(work.items)
            if ids and (last or len(ids) == self._batch_size):
                flush(work)
            if last:
                self._put(self._feed, _End(works.popleft(), failed))
                failed = 0
        self._check()
        self._buffers.put(buffer)
        self._put(self._feed, None)

    def _claimed(self, wanted: Wanted) -> Iterator[Work | Unwritten]:
        """The partitions that no other process has: in rounds, until there is none in a round,
        since one that dies lets go of its own."""
        parts = self._plan.partitions
        if self._locks is None:
            for index in wanted:
                items = self._job.listed(index, parts[index].images)
                yield Unwritten(self._plan, index, items)
            return
        output = self._job.output
        left = list(wanted)
        claimed = True
        while left and claimed:
            busy, claimed = [], False
            for index in left:
                items = read_items(output, parts[index], self._plan.configuration["keep"])
                try:
                    work = Work(
                        output,
                        self._plan,
                        index,
                        items,
                        self._shapes,
                        self._locks,
                        self._job.store,
                    )
                except BusyError:
                    busy.append(index)
                    continue
                if work.earlier != wanted[index]:  # another process was quicker
                    work.drop()
                    continue
                claimed = True
                self._open.append(work)
                yield work
            left = busy

    def _count_failure(self, item: Item, outcome: Outcome) -> None:
        self._failures += 1
        if self._options.on_error == "fail":
            raise StellarError(
                f"{item.id}: {outcome.reason}; with --on-error record it would be a line of the "
                "index"
            )
        most = self._options.max_errors
        if most is not None and self._failures > most:
            raise StellarError(
                f"{self._failures} images failed, more than --max-errors {most}; the last is "
                f"{item.id}: {outcome.reason}"
            )

    # The engine's thread

    def _encode(self) -> Iterator[None]:
        """Hands every batch to the engine; one item after each step."""
        ahead: deque[tuple[_Batch, Moving] | _End | None] = deque()
        batches = 0
        while True:
            with self.timer.stage("wait"):
                thing: _Batch | _End | None = self._get(self._feed)
            if isinstance(thing, _Batch):
                with self.timer.stage("encode"):
                    images = self._copies.use(thing.moving)
                    features = self._engine.encode(images, outputs=self._features)
                    ahead.append((thing, self._copies.down(features)))
                batches += 1
            else:
                ahead.append(thing)
            while ahead and (
                thing is None or batches > self._copies.ahead or not isinstance(ahead[0], tuple)
            ):
                oldest = ahead.popleft()
                failed = images_done = 0
                if isinstance(oldest, tuple):
                    batch, moving = oldest
                    with self.timer.stage("encode"):
                        moving.wait()
                    batches -= 1
                    self._buffers.put(batch.buffer)
                    failed, images_done = batch.failed, batch.failed + len(batch.ids)
                elif oldest is not None:
                    failed = images_done = oldest.failed
                with self.timer.stage("blocked"):
                    self._put(self._written, oldest)
                if images_done and self._report is not None:
                    self._report(images_done, failed, self.timer.take())
                yield
            if thing is None:
                return

    # The thread behind the engine

    def _write(self) -> None:
        while (thing := self._get(self._written)) is not None:
            with self.timer.stage("write"):
                if isinstance(thing, _End):
                    manifest = thing.work.finish(self._made)
                    self._open = [work for work in self._open if work is not thing.work]
                    self._manifests.put(manifest)
                else:
                    batch, moving = thing
                    rows = {name: value.float().numpy() for name, value in moving.tensors.items()}
                    batch.work.append(batch.ids, rows)
