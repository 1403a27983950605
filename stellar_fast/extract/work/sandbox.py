"""What a decoding process may take of the machine, whatever the files say that it decodes.

The process limits itself once, before it sees the first file:

* memory: `Limits.memory` beyond what it has then. Counted is private writable memory (RLIMIT_DATA),
  all that decoders allocate. Neither shared memory, nor libraries' code, nor address space that is
  only reserved counts, so the limit is the same for a process that has imported torch. What is
  refused becomes a MemoryError, or whatever the decoder makes of it. Linux only.
* files: none of more than `FILE_BYTES`, and no core.
* privileges: no more by executing a program. Linux only.
* Pillow's module-wide settings: what `stellar_fast.images` expects, whatever was imported before.

And each image's time: a signal that nothing handles ends the process, whatever its decoder is at,
and though the process that started it may be gone. `Workers` knows it by that signal.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import AvifImagePlugin, GifImagePlugin, Image, ImageFile, PngImagePlugin

from ...images.refusals import MAX_PIXELS

DECODE_SECONDS = 30.0
LEAST_MEMORY = 2048  # MiB
# Bytes for each pixel of the costliest picture: WebP and AVIF with an alpha channel take 36.
BYTES_A_PIXEL = 40
# Decoding writes no files; a store's client may keep the token that it was given.
FILE_BYTES = 1 << 20
TIME_IS_UP = signal.SIGALRM
_PR_SET_NO_NEW_PRIVS = 38  # of linux/prctl.h


@dataclass(frozen=True)
class Limits:
    """Of one image.

    Attributes:
        max_pixels: the largest width times height.
        seconds: to decode and resize it in, by the clock.
        memory: MiB that its process may take beyond what it has at its start.
    """

    max_pixels: int = MAX_PIXELS
    seconds: float = DECODE_SECONDS
    memory: int = LEAST_MEMORY


def memory_for(max_pixels: int) -> int:
    """MiB in which every picture of so many pixels can be decoded."""
    return max(LEAST_MEMORY, BYTES_A_PIXEL * max_pixels >> 20)


def enter(limits: Limits) -> None:
    """Limits this process, for good."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    if sys.platform == "linux":
        _lower(resource.RLIMIT_DATA, _data_bytes() + (limits.memory << 20))
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.signal(TIME_IS_UP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {TIME_IS_UP})
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    GifImagePlugin.LOADING_STRATEGY = GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST
    PngImagePlugin.MAX_TEXT_CHUNK = ImageFile.SAFEBLOCK
    PngImagePlugin.MAX_TEXT_MEMORY = 64 * ImageFile.SAFEBLOCK
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there is a process for each core


@contextmanager
def decoding_time(seconds: float) -> Iterator[None]:
    """Ends this process, which `enter` has limited, if the block takes longer."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _lower(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it, with the stack."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * os.sysconf("SC_PAGE_SIZE")
