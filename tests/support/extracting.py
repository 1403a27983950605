"""What the tests of extraction share."""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from stellar_fast.extract import originals
from stellar_fast.extract.work import decoding

SUPPORT = Path(__file__).parent  # what other processes import these from


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*"))


def index(output: Path) -> dict[str, list]:
    """The index of all partitions; `row` counts within each."""
    tables = [parquet.read_table(part / "index.parquet").to_pydict() for part in parts(output)]
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def feature(output: Path, name: str) -> np.ndarray:
    """The rows of all partitions."""
    return np.concatenate([np.load(part / f"{name}.npy") for part in parts(output)])


def contents(output: Path) -> dict[str, bytes]:
    """Every file of an output that does not hold times, and its manifests without them."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_dir() or name == ".lock" or path.name.startswith("stats"):
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["made"]
            content = json.dumps(manifest).encode()
        found[name] = content
    return found


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


class Wrapped:
    """An engine with another `encode`."""

    config: Any
    device: Any
    precision: Any
    backend: Any
    weights: Any
    weights_sha256: Any
    max_batch: Any

    def __init__(self, engine, encode: Any) -> None:
        names = ("config", "device", "precision", "backend", "max_batch")
        for name in (*names, "weights", "weights_sha256"):
            setattr(self, name, getattr(engine, name))
        self.encode = encode


def scaled(engine, factor: float) -> Wrapped:
    """An engine whose features are `factor` times larger."""

    def encode(images, **arguments):
        return {name: value * factor for name, value in engine.encode(images, **arguments).items()}

    return Wrapped(engine, encode)


# What decoding processes, and processes of devices, run in the tests.

SMALL_PARTS = {"partition_size": 8, "batch_size": 4}
SMALL = {"partition_size": 3, "batch_size": 2}


def deadly_work(*arguments) -> None:
    """A decoding process that dies of images called "deadly", and never returns from "endless"."""
    read_item = decoding.read_item

    def read(item, allowed):
        if "deadly" in item.id:
            os.kill(os.getpid(), signal.SIGKILL)
        if "endless" in item.id:
            Path(f"{item.file}.begun-{os.getpid()}").touch()
            time.sleep(3600)
        return read_item(item, allowed)

    patched: Any = decoding
    patched.read_item = read
    decoding.work(*arguments)


def deadly_pictures(*arguments) -> None:
    """A process of `originals` that decodes images called "endless" for ever."""
    decode = originals.decode
    endless: list[str] = []

    def read(item, allowed):
        endless[:] = [item.id] if "endless" in item.id else []
        return decoding.read_item(item, allowed)

    def decode_or_not(*given, **named):
        time.sleep(3600 if endless else 0)
        return decode(*given, **named)

    patched: Any = originals
    patched.read_item, patched.decode = read, decode_or_not
    originals._work(*arguments)


def false_start(*arguments) -> None:
    """A decoding process that ends before it is ready."""
    sys.exit(7)


def load_marking_its_end(mark: Path, device: str):
    """`load_small`, in a process that leaves a mark if its interpreter comes to its end."""
    atexit.register(mark.touch)
    return load_small(device)


def load_small(device: str):
    """An engine for one process of several."""
    if device == "toaster":
        raise ValueError("no such device")
    from engines import small_engine  # torch, which decoding processes do without

    engine = small_engine(device="cpu")
    if device == "cpu":
        return engine

    def encode(images, **named):
        if len(images) and device == "mortal":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1 if len(images) and device == "slow" else 0)
        return engine.encode(images, **named)

    return Wrapped(engine, encode)
