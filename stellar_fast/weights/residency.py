"""Weights that take memory only while something reads them: those in a file, mapped.

OpenVINO keeps the constants of a graph beside its own packed copies, and might read them again for
a new shape. So engines on it lay large weights into nameless files: what was read is given back,
and what is read again comes from the disk. On other systems than Linux, and where there is no room
in `TMPDIR` (by default /var/tmp, which is a disk where /tmp may be memory), they stay in memory.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes of a tensor that a file is worth
_MAPS = "/proc/self/maps"  # addresses, rights, offset, device, inode, path
_OF_A_FILE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]", re.MULTILINE)


def in_file(tensor: Tensor) -> Tensor:
    """A copy of `tensor` in a nameless file of its own, or `tensor` itself: if it is small, not on
    the CPU, or in a file, or if there is no place for files."""
    here = tensor.device.type == "cpu" and tensor.nbytes >= LARGE
    if sys.platform != "linux" or not here or tensor.untyped_storage().filename is not None:
        return tensor
    source = tensor.contiguous()
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            # Written, not stored into mapped pages: where a disk is full that is an error to catch.
            file.write(source.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            name, size = f"/proc/self/fd/{file.fileno()}", tensor.numel()
            return torch.from_file(name, True, size, dtype=tensor.dtype).view(tensor.shape)
    except OSError:
        return tensor


def let_go(tensors: Iterable[Tensor]) -> None:
    """Gives back the memory of what of these tensors is mapped from files, and of nothing else: its
    next reader has it from the file again."""
    large = [x for x in tensors if x.device.type == "cpu" and not x.is_mkldnn and x.nbytes >= LARGE]
    if not large or not os.path.exists(_MAPS):
        return
    ranges = _mapped_from_files()
    starts = [start for start, _ in ranges]
    for tensor in large:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        place = bisect.bisect_right(starts, begin) - 1
        if place >= 0 and end <= ranges[place][1]:
            first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            _madvise()(first, end // mmap.PAGESIZE * mmap.PAGESIZE - first, mmap.MADV_DONTNEED)


def _mapped_from_files() -> list[tuple[int, int]]:
    """Addresses (start, stop), in order."""
    with open(_MAPS, "rb") as file:
        return [(int(start, 16), int(stop, 16)) for start, stop in _OF_A_FILE.findall(file.read())]


@functools.cache
def _madvise() -> ctypes._FuncPointer:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def trim() -> None:
    """Gives back what the allocator keeps of memory that was freed: after packing that is a third
    of the weights. Where it is glibc's; others do so by themselves."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
