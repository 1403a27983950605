"""Partitions through one engine: decoding processes before it, a thread that writes behind it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import StellarError
from ..input.addresses import Allowed
from ..input.door import NOTHING_MORE
from ..output.folder import Locks
from ..output.layout import Partition, Plan, read_items
from ..output.partition import Unwritten, Work
from ..records import Item
from ..stats import Timer
from .decoding import SHAPE, Outcome, pixels_dtype
from .sandbox import Limits
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
        self, images: Any, *, outputs: Collection[str] | None = ..., check_range: bool = ...
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Options:
    """How to work; nothing of it changes the features, only which images have any.

    Attributes:
        workers: processes that decode.
        on_error: "record" images that cannot be read in the index, or "fail" at the first.
        max_errors: images that may fail before the run does; None is any number.
        retry_failed: make complete partitions again for their images that failed.
        dummy_reader: encode noise instead of the images, to measure everything but reading.
        dummy_writer: write nothing, to measure everything but writing.
        allowed: what may be read beyond the defaults; never the plan's, which may be another's.
        limits: of decoding one image. They are in every manifest, not in the plan: an image that
            failed by them may be tried again under others.
    """

    workers: int
    on_error: str = "record"
    max_errors: int | None = None
    retry_failed: bool = False
    dummy_reader: bool = False
    dummy_writer: bool = False
    allowed: Allowed = NOTHING_MORE
    limits: Limits = field(default_factory=Limits)


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
        output: Path | None,
        plan: Plan,
        engine: Encoder,
        options: Options,
        *,
        items: Callable[[Partition], list[Item]] | None = None,
        report: Report | None = None,
    ) -> None:
        """
        Args:
            output: the folder that has the plan; None to write nothing.
            items: the images of a partition; those that `output` has for it, if left out.
            report: is called with the images and the failed images finished since its last call,
                and the seconds of each stage since then.

        Raises:
            StellarError: the output cannot be written, or no process can be started.
        """
        import torch

        from .copies import Copies

        if items is None:
            if output is None:
                raise ValueError("without an output there must be items")
            items = partial(read_items, output)
        self.timer = Timer()
        self._output, self._plan, self._engine = output, plan, engine
        self._options, self._items, self._report = options, items, report
        configuration = plan.configuration
        self._batch_size: int = configuration["batch_size"]
        self._features: list[str] = configuration["features"]
        self._check_range = configuration["preset"] != "eval"  # its bicubic overshoots [0, 1]
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
        self._error: BaseException | None = None
        self._made: dict[str, Any] = {
            "device": str(engine.device),
            "backend": engine.backend,
            "limits": asdict(options.limits),
        }
        self._failures = 0
        self._locks = None if output is None else Locks(output)
        try:
            self._workers = Workers(
                options.workers,
                configuration["preset"],
                self._batch_size,
                dummy=options.dummy_reader,
                allowed=options.allowed,
                limits=options.limits,
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

    def run(self, indices: Iterable[int]) -> Generator[dict[str, Any], None, None]:
        """Makes partitions, one after another without a pause between them: their manifests.

        A partition that is complete is made again for the images that failed. When this raises, or
        is closed, partitions that are not complete are dropped, and the pipeline is of no more use.

        Raises:
            StellarError: the output cannot be written, a feature does not fit its dtype, or images
                failed that may not.
            Stopped: by `stop`.
        """
        self._check()
        self._feed: queue.Queue[_Batch | _End | None] = queue.Queue(BATCHES_AHEAD)
        self._written: queue.Queue[tuple[_Batch, Moving] | _End | None] = queue.Queue(BATCHES_AHEAD)
        self._manifests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._open: list[Work | Unwritten] = []
        threads = [
            threading.Thread(target=self._guarded, args=(target, *arguments), name=name)
            for name, target, *arguments in (
                ("feed", self._decode, iter(indices)),
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
        if self._stop.is_set():
            raise Stopped

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

    def _decode(self, indices: Iterator[int]) -> None:
        """Puts full batches of good images into `_feed`, and the end of every partition."""
        works: deque[Work | Unwritten] = deque()

        def items() -> Iterator[Item]:
            for index in indices:
                works.append(self._begin(index))
                yield from works[-1].items

        buffer: Tensor = self._get(self._buffers)
        ids: list[str] = []
        failed = 0

        def flush(work: Work | Unwritten) -> None:
            nonlocal buffer, ids, failed
            moving = self._copies.up(buffer[: len(ids)])
            self._put(self._feed, _Batch(work, ids, buffer, moving, failed))
            buffer, ids, failed = self._get(self._buffers), [], 0

        for outcome in self._workers.decode(items(), self._stop.is_set):
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

    def _begin(self, index: int) -> Work | Unwritten:
        items = self._items(self._plan.partitions[index])
        if self._output is None or self._locks is None:
            return Unwritten(self._plan, index, items)
        work = Work(self._output, self._plan, index, items, self._shapes, self._locks)
        self._open.append(work)
        return work

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
                    features = self._engine.encode(
                        images, outputs=self._features, check_range=self._check_range
                    )
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
