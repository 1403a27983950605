"""Device time of alternatives in turn, on inputs rotated through more than the L2 cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from harness import Timing

Call = Callable[[], object]


def first_line(error: BaseException) -> str:
    """An error as a result file says it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def sets_beyond_cache(bytes_of_a_set: int, cache: int, most: int = 32) -> int:
    """How many sets of inputs are together larger than twice the cache; two at least."""
    return max(2, min(most, -(-2 * cache // max(1, bytes_of_a_set))))


def time_in_turn(
    calls: Mapping[str, Sequence[Call]],
    *,
    seconds: float,
    warmup: int = 3,
    least: int = 10,
    not_run: dict[str, str] | None = None,
    event: Callable[[], Any] | None = None,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Seconds of each alternative by events on the device.

    Args:
        calls: for each name the same call on each set of inputs, taken one after another.
        seconds: wall time after which no round begins.
        least: rounds made whatever the time.
        not_run: when given, an alternative that fails is left out and its reason put there, unless
            the device is lost.
        event, synchronize, clock: of the device; tests hand in others.
    """
    event = event or (lambda: torch.cuda.Event(enable_timing=True))
    synchronize = synchronize or torch.cuda.synchronize
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}

    def fails(name: str, sets: Sequence[Call], round_: int) -> bool:
        try:
            sets[round_ % len(sets)]()
        except Exception as error:
            if not_run is None:
                raise
            synchronize()  # raises where the device is lost
            torch.cuda.empty_cache()
            not_run[name] = first_line(error)
            del marks[name]
            return True
        return False

    for name, sets in calls.items():
        for i in range(warmup):
            if fails(name, sets, i):
                break
        synchronize()
    end, done = clock() + seconds, 0
    while marks and (done < least or clock() < end):
        for name in list(marks):
            start, stop = event(), event()
            start.record()
            if fails(name, calls[name], done):
                continue
            stop.record()
            marks[name].append((start, stop))
        done += 1
        synchronize()
    return {
        name: Timing.of([start.elapsed_time(stop) / 1e3 for start, stop in pairs])
        for name, pairs in marks.items()
    }
