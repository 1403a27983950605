"""The decoding processes of one engine: started, fed, and replaced when they die."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection, forkserver, resource_tracker
from types import ModuleType
from typing import Any

from ...errors import StellarError
from ..input.addresses import Allowed
from ..input.door import NOTHING_MORE
from ..records import Item
from .decoding import MOST_ORDERS, READY, Order, Outcome, Slots, pixels_dtype, slot_bytes, work
from .sandbox import TIME_IS_UP, Limits

# Lists of orders that a process has: one in work and one that waits, so that it never does.
LISTS_AHEAD = 2
# Images of one row group of a Parquet file in one list: a group that fits is read by one process
# alone. The `datasets` library has 100 in a group.
MOST_OF_GROUP = 128
MOST_SHARED = 512 << 20  # bytes of slots that such lists may take; all else takes little
# Seconds to read one list of orders in, besides what its images have to be decoded in.
PATIENCE = 300.0
START_PATIENCE = 120.0  # seconds to be ready in
# Processes that die one after another before they are ready.
FALSE_STARTS = 3
_HIDING = threading.Lock()
POLL = 0.5  # seconds between looks at the clock and at `stopped`


class _Process:
    """One decoding process, and the lists of orders that it has not answered, oldest first."""

    def __init__(self, context: Any, arguments: tuple[Any, ...]) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, *arguments), daemon=True, name="decode"
        )
        with without_interrupts(), without_script():
            self.process.start()
        theirs.close()
        self.ready = False
        self.lists: deque[list[Order]] = deque()
        self.left = 0  # images in them
        self.since = time.monotonic()

    def send(self, orders: list[Order]) -> None:
        if not self.lists:
            self.since = time.monotonic()
        self.lists.append(orders)
        self.left += len(orders)
        with suppress(OSError):  # it died, which its sentinel tells
            self.connection.send(orders)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which is for their parent to act on."""
    resource_tracker.ensure_running()  # it would end the block
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


@contextmanager
def without_script() -> Iterator[None]:
    """Processes started in here do not import the script that is run, as multiprocessing has them
    do: it may be a notebook or come from a pipe, and need no guard. They run this package alone."""
    with _HIDING:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


class Workers:
    """Decoding processes that share slots of pixels with this one.

    They are forked from a server that has never seen the engine: threads and CUDA do not survive a
    fork.
    """

    def __init__(
        self,
        count: int,
        preset: str,
        batch_size: int,
        *,
        scaled_decode: bool = False,
        dummy: bool = False,
        allowed: Allowed = NOTHING_MORE,
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            scaled_decode: see `images.presets.load_image`.
            allowed: what may be read beyond the defaults.
            limits: of every image; the defaults if left out.

        Raises:
            StellarError: this process cannot start others.
        """
        _check_parent()
        self._orders = max(1, min(MOST_ORDERS, batch_size // (2 * count)))
        # Two batches ahead of the engine, and what the processes have in hand.
        self._ahead = 2 * batch_size + count * LISTS_AHEAD * self._orders
        most = MOST_SHARED // slot_bytes(preset) // count - self._orders
        self._of_group = max(self._orders, min(MOST_OF_GROUP, most))
        room = self._ahead + count * (self._of_group - self._orders)
        self.slots = Slots(room, pixels_dtype(preset))
        self._free = list(range(room))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([work.__module__])
        with without_interrupts():
            forkserver.ensure_running()
        self._limits = limits or Limits()
        self._arguments = (self.slots, preset, scaled_decode, dummy, allowed, self._limits)
        self._processes: list[_Process] = []
        self._false_starts = 0
        self._died_on: dict[int, str] = {}  # order's number -> how its process died
        try:
            for _ in range(count):
                self._processes.append(_Process(self._context, self._arguments))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [process.process.pid for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            process.connection.close()
        for process in self._processes:
            process.process.join(0 if process.lists else 1)
            process.kill()
        self._processes = []
        self.slots.close()

    def decode(
        self, items: Iterable[Item], stopped: Callable[[], bool]
    ) -> Generator[Outcome, None, None]:
        """The outcome of every item, in order. A slot is the caller's until the next outcome.

        Raises:
            StellarError: no process can be started.
        """
        lists = self._lists(iter(items))
        following = next(lists, None)
        retries: deque[list[Order]] = deque()
        done: dict[int, Outcome] = {}
        numbers = taken = 0
        while not stopped():
            while done and taken in done:
                outcome = done.pop(taken)
                yield outcome
                self._free.append(outcome.slot)
                taken += 1
                if stopped():
                    return
            while (idle := self._next_idle()) is not None:
                if retries:
                    idle.send(retries.popleft())
                    continue
                # Only whole lists, or every slot that gets free would be a message of its own.
                if following is None or numbers - taken + len(following) > self._room(following):
                    break
                orders = [
                    Order(numbers + at, self._free.pop(), replace(item, kept=()))
                    for at, item in enumerate(following)
                ]
                numbers += len(orders)
                idle.send(orders)
                following = next(lists, None)
            if following is None and taken == numbers:
                return
            if taken not in done:
                for outcome in self._receive(retries):
                    done[outcome.number] = outcome

    def _lists(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        """Items in lists for one process each: of one row group, or of none."""
        for grouped, run in itertools.groupby(items, _group_of):
            size = self._orders if grouped is None else self._of_group
            while found := list(itertools.islice(run, size)):
                yield found

    def _room(self, items: list[Item]) -> int:
        """Slots that may be taken for these items to be sent: no more than are needed to keep the
        processes busy, as pixels take memory."""
        return self._ahead if _group_of(items[0]) is None else self.slots.count

    def _next_idle(self) -> _Process | None:
        """Of the processes that can take one more list, the one with the fewest images."""
        idle = [
            process
            for process in self._processes
            if len(process.lists) < LISTS_AHEAD and process.left <= self._orders
        ]
        return min(idle, key=lambda process: process.left, default=None)

    def _receive(self, retries: deque[list[Order]]) -> list[Outcome]:
        """Waits for answers, and replaces processes that died or do not return."""
        found: list[Outcome] = []
        awaited = {process.connection: process for process in self._processes}
        sentinels = {process.process.sentinel: process for process in self._processes}
        ready = connection.wait([*awaited, *sentinels], POLL)
        for process in list(self._processes):
            if process.connection in ready or process.process.sentinel in ready:
                found += self._read(process)
            if process.process.sentinel in ready:
                found += self._replace(process, retries, self._end_of(process))
                continue
            waited = time.monotonic() - process.since
            if process.ready and process.lists:
                # A process that decodes for too long ends by itself.
                told = min(len(process.lists[0]), MOST_ORDERS)
                if waited > PATIENCE + told * self._limits.seconds:
                    why = f"reading took more than {PATIENCE:g} s"
                    found += self._replace(process, retries, why)
            elif not process.ready and waited > START_PATIENCE:
                found += self._replace(process, retries, "a decoding process hung")
        return found

    def _end_of(self, process: _Process) -> str:
        code = process.process.exitcode
        if process.ready and code == -TIME_IS_UP:
            return f"decoding took more than {self._limits.seconds:g} s"
        return f"the decoding process died ({exit_of(code)})"

    def _read(self, process: _Process) -> list[Outcome]:
        found: list[Outcome] = []
        try:
            while process.connection.poll():
                message = process.connection.recv()
                process.since = time.monotonic()
                if message == READY:
                    process.ready = True
                    self._false_starts = 0
                    continue
                del process.lists[0][: len(message)]
                process.left -= len(message)
                if not process.lists[0]:
                    process.lists.popleft()
                found += message
        except (EOFError, OSError):
            pass  # it died, perhaps in the middle of an answer; its sentinel tells
        return found

    def _replace(self, process: _Process, retries: deque[list[Order]], why: str) -> list[Outcome]:
        """A new process for one that died. The images that it had in work are tried once more,
        each in a list of its own, since one of them may have been the cause."""
        process.kill()
        lists = list(process.lists)
        failed = []
        if process.ready and lists:
            orders = lists.pop(0)
            if rest := orders[MOST_ORDERS:]:
                lists.insert(0, rest)
            for order in orders[:MOST_ORDERS]:
                if order.number in self._died_on:
                    del self._died_on[order.number]
                    failed.append(Outcome(order.number, order.slot, f"{why}, twice"))
                else:
                    self._died_on[order.number] = why
                    retries.append([order])
        elif not process.ready:
            self._false_starts += 1
            if self._false_starts >= FALSE_STARTS:
                raise StellarError(
                    f"{why} before it was ready, {FALSE_STARTS} times in a row; it may have said "
                    "why, above"
                )
        retries.extend(lists)
        self._processes[self._processes.index(process)] = _Process(self._context, self._arguments)
        return failed


def _group_of(item: Item) -> tuple[str, int] | None:
    """The row group that an item is in, if it is in one."""
    return None if item.group is None else (item.file, item.group)


def _check_parent() -> None:
    """Raises StellarError in a process that cannot have children."""
    if multiprocessing.current_process().daemon:
        raise StellarError(
            "extraction starts processes, which a daemonic process may not: start this one with "
            "daemon=False, or by concurrent.futures.ProcessPoolExecutor"
        )


def exit_of(exitcode: int | None) -> str:
    """How a process ended, in words."""
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit status {exitcode}"


def cores() -> int:
    """Cores that this process may use; all there are where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
