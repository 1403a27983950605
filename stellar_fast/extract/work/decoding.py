"""What a decoding process does: files in, pixels into shared memory."""

from __future__ import annotations

import mmap
import os
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from ...errors import ImageError
from ...images.presets import SIZE, least_side, preset_pixels
from ...images.reader import SIZE_IN_FILE, decode, describe_error
from ..input.addresses import Allowed
from ..input.cells import read_item
from ..records import Item
from .sandbox import Limits, decoding_time, enter

SHAPE = (3, SIZE, SIZE)
# Images whose outcomes are told at once: fewer messages, but more to do again when a process dies.
MOST_ORDERS = 8


class Slots:
    """Pictures in memory that several processes see: `array` is (count, 3, 224, 224).

    The memory has no name, so a killed process leaves nothing behind, and it does not count towards
    /dev/shm, which containers keep small.
    """

    def __init__(self, count: int, dtype: str, descriptor: int | None = None) -> None:
        self.count, self.dtype = count, dtype
        length = count * int(np.prod(SHAPE)) * np.dtype(dtype).itemsize
        if descriptor is None:
            descriptor = _nameless()
            os.ftruncate(descriptor, length)
        self._descriptor = descriptor
        self.array = np.frombuffer(mmap.mmap(descriptor, length), dtype).reshape(count, *SHAPE)

    def close(self) -> None:
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.count, self.dtype, DupFd(self._descriptor))


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stellar-fast-slots", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _attach(count: int, dtype: str, descriptor: Any) -> Slots:
    return Slots(count, dtype, descriptor.detach())


def pixels_dtype(preset: str) -> str:
    return "float32" if preset == "eval" else "uint8"


def slot_bytes(preset: str) -> int:
    return int(np.prod(SHAPE)) * np.dtype(pixels_dtype(preset)).itemsize


@dataclass(frozen=True)
class Order:
    """One image to decode into a slot."""

    number: int
    slot: int
    item: Item


@dataclass(frozen=True)
class Outcome:
    """What became of an order: its pixels are in the slot, unless there is a reason.

    Attributes:
        width, height: of the upright picture in the file, in pixels; None if it failed.
        read, decode: seconds.
    """

    number: int
    slot: int
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    read: float = 0.0
    decode: float = 0.0


READY = "ready"


def work(
    connection: Connection,
    slots: Slots,
    preset: str,
    scaled_decode: bool,
    dummy: bool,
    allowed: Allowed,
    limits: Limits,
) -> None:
    """Answers lists of orders by outcomes in their order, a few at a time and none of two lists
    together, until the other end is closed.

    Args:
        scaled_decode: see `images.presets.load_image`.
        dummy: read nothing, and fill the slots with noise.
        allowed: what may be read beyond the defaults.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    noise = None
    if dummy:
        noise = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
        if pixels_dtype(preset) == "float32":
            noise = noise / np.float32(255)
    elif preset == "eval":
        import torch

        torch.set_num_threads(1)
    least = least_side(preset, scaled_decode)
    enter(limits)
    try:
        connection.send(READY)
        while True:
            orders: list[Order] = connection.recv()
            outcomes: list[Outcome] = []
            for at, order in enumerate(orders, 1):
                if noise is None:
                    outcomes.append(_carry_out(order, slots, preset, least, allowed, limits))
                else:
                    slots.array[order.slot] = noise
                    outcomes.append(Outcome(order.number, order.slot, None, SIZE, SIZE))
                if at == len(orders) or len(outcomes) == MOST_ORDERS:
                    connection.send(outcomes)
                    outcomes = []
    except (EOFError, ConnectionError):
        pass  # done, or the process that wanted the pictures is gone


def _carry_out(
    order: Order,
    slots: Slots,
    preset: str,
    least: int | None,
    allowed: Allowed,
    limits: Limits,
) -> Outcome:
    start = time.perf_counter()
    read = start
    try:
        content = read_item(order.item, allowed)
        read = time.perf_counter()
        with decoding_time(limits.seconds):
            image = decode(content, max_pixels=limits.max_pixels, least_side=least)
            slots.array[order.slot] = preset_pixels(image, preset)
    except Exception as error:
        end = time.perf_counter()
        if read == start:
            read = end
        reason = _reason(error, limits)
        return Outcome(order.number, order.slot, reason, read=read - start, decode=end - read)
    width, height = image.info.get(SIZE_IN_FILE, image.size)
    end = time.perf_counter()
    return Outcome(
        order.number,
        order.slot,
        width=width,
        height=height,
        read=read - start,
        decode=end - read,
    )


def _reason(error: Exception, limits: Limits) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):  # torch's words
        return f"needs more than {limits.memory} MiB of memory (--worker-memory)"
    return error.reason if isinstance(error, ImageError) else describe_error(error)
