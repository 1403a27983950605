"""Work in many threads at a time."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def in_threads(work: Callable[[Given], Result], given: Iterable[Given]) -> list[Result]:
    """What `work` gives for each, every one in a thread of its own, begun together.

    Raises:
        Exception: the first that `work` raised.
    """
    each = list(given)
    start = threading.Barrier(len(each))

    def begin(one: Given) -> Result:
        start.wait()
        return work(one)

    with ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(begin, each))
