"""Memory that kernels are watched in: poisoned where they allocate, bounded where they reach."""

import importlib

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from stellar_fast.kernels.launch import is_interpreted

linear = importlib.import_module("stellar_fast.kernels.linear")


class _Watch:
    """The memory of one launch: storages as (first, end) addresses, in order."""

    def __init__(self) -> None:
        self.first = np.empty(0, np.uint64)
        self.end = np.empty(0, np.uint64)

    def take(self, arguments) -> None:
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        self.first = np.array([first for first, _ in spans], np.uint64)
        self.end = np.array([end for _, end in spans], np.uint64)

    def check(self, pointers, mask) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not addresses.size:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.searchsorted(self.first, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > self.end[at])
        assert not outside.any(), f"{outside.sum()} of {addresses.size} addresses are out of bounds"


@pytest.fixture
def bounded(monkeypatch):
    """Fails where an interpreted kernel leaves its arguments' memory.

    Compiled kernels are not watched: on a GPU that is compute-sanitizer's work.
    """
    if not is_interpreted():
        return
    watch = _Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    take = executor._init_args_hst

    def watched_take(self, positional, keywords):
        watch.take([*positional, *keywords.values()])
        return take(self, positional, keywords)

    def watched_load(self, pointers, mask, *rest, **options):
        watch.check(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def watched_store(self, pointers, value, mask, *rest, **options):
        watch.check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(executor, "_init_args_hst", watched_take)
    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)


@pytest.fixture
def unplanned(monkeypatch):
    """Products are planned anew at every call, so that what a test changes in their file counts."""
    monkeypatch.setattr(linear, "_plan", linear._plan.__wrapped__)


@pytest.fixture
def poisoned(monkeypatch):
    """Fills the memory that launchers allocate with NaN: what a kernel leaves out is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(tensor):
        if tensor.dtype.is_floating_point:
            tensor.view(torch.uint8).fill_(255)  # all ones is NaN in every float format
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
