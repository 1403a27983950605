"""The one timing loop: alternatives in turns, in another order each round.

A drift of the machine's speed then hits all of them alike, and nobody always runs behind the same
other one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
Turn = Callable[[int], float]  # the number of the round, negative while warming up -> seconds


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and quartiles over `rounds` calls."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def first_line(error: BaseException) -> str:
    """An error as a result file says it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def sets_beyond_cache(bytes_of_a_set: int, cache: int, most: int = 32) -> int:
    """How many sets of inputs are together larger than twice the cache; two at least."""
    return max(2, min(most, -(-2 * cache // max(1, bytes_of_a_set))))


def on_host(calls: Sequence[Call], wait: Call = lambda: None) -> Turn:
    """The call of each round by the host's clock; `wait` is part of it."""

    def turn(index: int) -> float:
        call = calls[index % len(calls)]
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    return turn


def on_gpu(calls: Sequence[Call], repeats: int = 1) -> Turn:
    """The call of each round by events on the device; seconds of one of its `repeats`."""

    def turn(index: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[index % len(calls)]()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats

    return turn


def turns_of(calls: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, Turn]:
    """For each name the same call on each set of inputs, taken one after another."""
    make = on_gpu if device.type == "cuda" else on_host
    return {name: make(sets) for name, sets in calls.items()}


def in_turns(
    turns: Mapping[str, Turn],
    *,
    least: int,
    seconds: float = 0.0,
    most: int | None = None,
    warmup: int = 0,
    must: Collection[str] | None = None,
    alive: Call = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every turn by name, and why an alternative has none.

    Args:
        least: rounds, whatever the time.
        seconds: after which no further round begins; `most` rounds end it earlier.
        warmup: rounds before them that do not count.
        must: whose failure is an error; by default everyone's. Another one that fails is left out.
        alive: raises where a failure was that of the device, and nobody's own.

    Raises:
        Exception: what one of `must` raised, or `alive`.
    """
    found: dict[str, list[float]] = {name: [] for name in turns}
    not_run: dict[str, str] = {}
    order = random.Random(0)
    index, end = -warmup, clock() + seconds
    while found and (index < least or clock() < end) and index != most:
        if index == 0:
            end = clock() + seconds
        for name in order.sample(list(found), len(found)):
            try:
                took = turns[name](index)
            except Exception as error:
                alive()
                if must is None or name in must:
                    raise
                not_run[name] = first_line(error)
                del found[name]
                continue
            if index >= 0:
                found[name].append(took)
        index += 1
    return found, not_run


def rows_of(seconds: Mapping[str, Sequence[float]], **facts: Any) -> list[dict[str, Any]]:
    """A row of a result file for each name."""
    return [{"name": name, **facts, **vars(Timing.of(taken))} for name, taken in seconds.items()]
