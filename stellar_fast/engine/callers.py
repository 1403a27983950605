"""What a caller has switched on in torch for the whole process, and the engine must not see."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_CPU = torch.device("cpu")


def unaffected(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which then does what it does without `torch.set_default_device`,
    `torch.set_float32_matmul_precision` and `torch.compile`, a graph break of its caller."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling():
            # Packed weights are of types that it cannot look into. It is imported by now.
            return torch._dynamo.disable(function)(*args, **kwargs)
        # Some microseconds less than the contexts, as most calls are.
        usual = torch.empty(0).device == _CPU
        if usual and not _KEPT.inside and _are_exact(_precisions()):
            return function(*args, **kwargs)
        with nullcontext() if usual else _CPU, _exact_products():
            return function(*args, **kwargs)

    return wrapper


def _precisions() -> tuple[str, ...]:
    """What products of float32 are computed in, by whichever of torch's two interfaces the caller
    has set it: the older one fails where it was the newer."""
    try:
        return (torch.get_float32_matmul_precision(),)
    except RuntimeError:
        return tuple(backend.matmul.fp32_precision for backend in _BACKENDS)


def _set_precisions(values: tuple[str, ...]) -> None:
    if len(values) == 1:
        torch.set_float32_matmul_precision(values[0])
        return
    for backend, value in zip(_BACKENDS, values, strict=True):
        backend.matmul.fp32_precision = value


_BACKENDS = (torch.backends.cuda, torch.backends.mkldnn)
_EXACT = frozenset(("highest", "ieee", "none"))


def _are_exact(values: tuple[str, ...]) -> bool:
    return _EXACT.issuperset(values)


class _Kept:
    """The precisions that the caller has set, while any thread is in `_exact_products`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.precisions: tuple[str, ...] = ()


_KEPT = _Kept()


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 have float32's precision in here. The setting is the process's: another
    thread's products may have it too meanwhile."""
    if not _KEPT.inside and _are_exact(_precisions()):
        yield
        return
    with _KEPT.lock:
        if not _KEPT.inside:
            _KEPT.precisions = _precisions()
            exact = "highest" if len(_KEPT.precisions) == 1 else "ieee"
            _set_precisions((exact,) * len(_KEPT.precisions))
        _KEPT.inside += 1
    try:
        yield
    finally:
        with _KEPT.lock:
            _KEPT.inside -= 1
            if not _KEPT.inside:
                _set_precisions(_KEPT.precisions)
