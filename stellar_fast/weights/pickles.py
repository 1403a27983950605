"""Torch pickles, read without running them: the opcodes that a state dict is written in, and no
others.

`torch.load(weights_only=True)` runs no code either, but it hashes whatever a pickle makes a key,
unpacks compressed members, and allocates what the pickle states before it looks into the file. Here
a pickle is first read as a description. Keys are strings or integers, every tensor lies inside its
storage, and every storage inside the file; only then are the wanted tensors read.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

MAX_PICKLE = 2_000_000  # bytes of opcodes; a published file with its teacher has some 200,000
MAX_READ = 10_000_000  # bytes of a zip archive at once, so also of its directory
CHUNK = 1 << 22
MAX_DIMENSIONS = 8
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_DTYPES = {
    f"torch {kind}Storage": dtype
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
# Tensors of other kinds, and what a training run's state has beside its tensors: read as None.
_PASSED_OVER = (
    "collections Counter",
    "torch Size",
    "torch device",
    "torch.serialization _get_layout",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_sparse_tensor",
)
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE")
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_WITH_ARGUMENT = (*_ARGUMENTS, *_TEXTS, *_PUTS, *_GETS, "PROTO", "FRAME")
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITTLE_ENDIAN = sys.byteorder == "little"
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

# What a damaged or hostile file brings forth in this module, in zipfile and in pickletools.
DAMAGE = (
    ValueError,  # also of UnicodeDecodeError
    LookupError,
    EOFError,
    OSError,
    RuntimeError,  # also of zipfile's NotImplementedError
    OverflowError,
    zipfile.BadZipFile,
)


class MoreThanTensors(Exception):
    """A pickle asks for something that no state dict needs."""


@dataclass(frozen=True)
class Storage:
    """`numel` values in a row, under `key` in the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor as described: values of `storage` from `offset` on, `stride` apart."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Callable[[View], Tensor]]]:
    """What a file of `torch.save` holds, with a `View` for every tensor, and the function that
    reads one, on the CPU.

    Raises:
        MoreThanTensors: it holds objects, or functions to be called.
        DAMAGE: it is none, or damaged.
    """
    storages: dict[str, Tensor] = {}
    with _Bounded(io.FileIO(path)) as file:
        size = path.stat().st_size
        found, fill = _zip(file, size) if file.peek(2)[:2] == b"PK" else _legacy(file, size)

        def read(view: View) -> Tensor:
            storage = view.storage
            if storage.key not in storages:
                storages[storage.key] = torch.empty(storage.numel, dtype=storage.dtype)
                fill(storage, storages[storage.key])
            return storages[storage.key].as_strided(view.shape, view.stride, view.offset)

        yield found, read


class _Bounded(io.BufferedReader):
    """A file of which no more than `MAX_READ` bytes are read at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = MAX_READ
        if size > MAX_READ:
            raise zipfile.BadZipFile(f"{size} bytes in one piece, at most {MAX_READ} are read")
        return super().read(size)


def _copy(file: IO[bytes], values: Tensor) -> None:
    into = values.view(torch.uint8).numpy()
    for start in range(0, len(into), CHUNK):
        part = into[start : start + CHUNK]
        content = file.read(len(part))
        if len(content) != len(part):
            raise EOFError("a storage ends before its time")
        part[:] = np.frombuffer(content, np.uint8)


Fill = Callable[[Storage, Tensor], None]


def _zip(file: _Bounded, size: int) -> tuple[Any, Fill]:
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise ValueError(f"{len(roots)} members data.pkl")
    root = roots[0].removesuffix("/data.pkl")
    if f"{root}/constants.pkl" in members:
        raise MoreThanTensors("TorchScript")
    if len(members) != len(archive.infolist()):
        raise ValueError("two members of one name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise ValueError("compressed members; torch.save writes none")
    if sum(member.file_size for member in members.values()) > size:
        raise ValueError("its members are larger than the file")
    order = f"{root}/byteorder"
    if order in members and archive.read(order) != sys.byteorder.encode():
        raise ValueError("written on a machine of the other byte order")
    if members[f"{root}/data.pkl"].file_size > MAX_PICKLE:
        raise ValueError(f"a pickle beyond {MAX_PICKLE} bytes")
    storages: dict[str, Storage] = {}
    found = interpret(io.BytesIO(archive.read(f"{root}/data.pkl")), storages)
    for key, storage in storages.items():
        if members[f"{root}/data/{key}"].file_size != storage.nbytes:
            raise ValueError("a storage of another length than its tensors'")

    def fill(storage: Storage, values: Tensor) -> None:
        with archive.open(f"{root}/data/{storage.key}") as member:
            _copy(member, values)

    return found, fill


def _legacy(file: _Bounded, size: int) -> tuple[Any, Fill]:
    """The format before torch 1.6: five pickles, then every storage behind its length."""
    head = io.BytesIO(file.read(MAX_PICKLE))
    if interpret(head, {}) != LEGACY_MAGIC or interpret(head, {}) != LEGACY_PROTOCOL:
        raise ValueError("no magic number of torch.save")
    machine = interpret(head, {})
    if type(machine) is not dict or machine.get("little_endian") is not _LITTLE_ENDIAN:
        raise ValueError("written on a machine of the other byte order")
    storages: dict[str, Storage] = {}
    found, keys = interpret(head, storages), interpret(head, {})
    if type(keys) is not list or not _is_text(*keys):
        raise ValueError("no list of storages")
    starts: dict[str, int] = {}
    end = head.tell()
    for key in keys:
        file.seek(end)
        if int.from_bytes(file.read(8), "little") != storages[key].numel:
            raise ValueError("a storage of another length than its tensors'")
        starts[key] = end + 8
        end = starts[key] + storages[key].nbytes
        if end > size:
            raise ValueError("its storages are larger than the file")

    def fill(storage: Storage, values: Tensor) -> None:
        file.seek(starts[storage.key])
        _copy(file, values)

    return found, fill


def interpret(data: IO[bytes], storages: dict[str, Storage]) -> Any:  # noqa: C901, by opcode
    """The pickle that `data` begins with, as dicts, lists, tuples, constants and views.

    Args:
        storages: filled with every storage it speaks of.

    Raises:
        MoreThanTensors, DAMAGE: see `opened`.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}
    for name, argument in _opcodes(data):
        if name in _TEXTS or name in _ARGUMENTS:
            stack.append(argument)
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name == "TUPLE":
            stack, items = below.pop(), stack
            stack.append(tuple(items))
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = [stack.pop() for _ in range(count)]
            stack.append(tuple(reversed(items)))
        elif name in _LITERALS:
            stack.append(_LITERALS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "SETITEMS":
            stack, items = below.pop(), stack
            _fill(stack[-1], items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], [key, value])
        elif name == "APPENDS":
            stack, items = below.pop(), stack
            _extend(stack[-1], items)
        elif name == "APPEND":
            item = stack.pop()
            _extend(stack[-1], [item])
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name == "STACK_GLOBAL":
            found, module = stack.pop(), stack.pop()
            stack.append(_global(f"{module} {found}" if _is_text(module, found) else "?"))
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            if storages.setdefault(storage.key, storage) != storage:
                raise ValueError("one storage in two forms")
            stack.append(storage)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of a dict, such as the versions of a module's parts
            if stack[-1] is not None and type(stack[-1]) is not dict:
                raise MoreThanTensors("BUILD")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise MoreThanTensors(name)
    raise AssertionError("a pickle ends with STOP, or in an error")


def _opcodes(data: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Names of opcodes, each with its argument if it is one of those that are understood."""
    while code := data.read(1):
        if code not in _OPCODES:
            raise ValueError(f"no opcode {code!r}")
        opcode = _OPCODES[code]
        argument = None
        if opcode.name == "GLOBAL":  # whose reader takes backslashes for escapes, and warns of them
            argument = " ".join(data.readline().decode().rstrip("\n") for _ in range(2))
        elif opcode.name in _WITH_ARGUMENT and opcode.arg is not None:
            argument = opcode.arg.reader(data)
        yield opcode.name, argument
    raise EOFError("a pickle without an end")


def _is_text(*values: object) -> bool:
    return all(type(value) is str for value in values)


def _fill(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        raise ValueError("an entry of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):  # the hash of nested tuples takes for ever
            raise MoreThanTensors(f"a key of type {type(key).__name__}")
        if key in target:
            raise ValueError("one key twice")
        target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError("an item of what is no list")
    target.extend(items)


@dataclass(frozen=True)
class _Function:
    name: str


def _global(name: str) -> torch.dtype | _Function | None:
    if name in _DTYPES:
        return _DTYPES[name]
    if name in (_DICT, _TENSOR, _PARAMETER, *_PASSED_OVER):
        return _Function(name)
    value = getattr(torch, name.removeprefix("torch "), None) if name.startswith("torch ") else None
    if isinstance(value, torch.dtype):
        return None
    raise MoreThanTensors(f"GLOBAL {name[:100]!r}")


def _storage(identity: Any) -> Storage:
    # In the legacy format a sixth entry says that the storage is a part of another.
    whole = type(identity) is tuple and len(identity) in (5, 6)
    if not whole or any(part is not None for part in identity[5:]):
        raise ValueError("a reference to what is no storage")
    kind, dtype, key, _, numel = identity[:5]
    if not _is_text(kind, key) or kind != "storage" or not isinstance(dtype, torch.dtype):
        raise ValueError("a reference to what is no storage")
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage of no length")
    return Storage(key, dtype, numel)


def _reduce(function: Any, arguments: Any) -> Any:
    if type(function) is not _Function or type(arguments) is not tuple:
        raise MoreThanTensors("REDUCE")
    if function.name == _TENSOR:
        if len(arguments) < 4:
            raise ValueError("a tensor without a shape")
        return _view(*arguments[:4])
    if function.name == _PARAMETER:
        if not arguments or type(arguments[0]) is not View:
            raise ValueError("a parameter of what is no tensor")
        return arguments[0]
    if function.name == _DICT:
        if arguments:
            raise ValueError("a dict made of something")
        return {}
    return None


def _are_sizes(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    )


def _view(storage: Any, offset: Any, shape: Any, stride: Any) -> View:
    if type(storage) is not Storage or not _are_sizes((offset,)):
        raise ValueError("a tensor without a storage")
    if not _are_sizes(shape) or not _are_sizes(stride) or len(shape) != len(stride):
        raise ValueError("a tensor of no shape")
    elements = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # Fewer values than elements would be one value many times over: terabytes, once copied.
    if elements > storage.numel or offset > storage.numel or (elements and last >= storage.numel):
        raise ValueError("a tensor reaches beyond its storage")
    return View(storage, offset, shape, stride)
