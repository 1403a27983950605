"""Output folders as a stranger may forge them: with manifests that agree with what was changed."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from outputs import made_up, write_output

import stellar_fast
from stellar_fast.errors import StellarError

WEIRD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 2**31, 2**63, 10**30, 1.5, 1e308, float("nan")),
    *("", "..", "../x", "/dev/zero", "sparse", "npy", "a" * 5000, "\ud800", "0" * 64),
    *([], {}, [[]], [5, 4, 6], {"": None}, [[[[[]]]]]),
)


PART = "part-00001"


def original(folder: Path, format: str) -> Path:
    """An output of two partitions of 5 images, of which 4 have rows."""
    write_output(folder, made_up(8), failed=(1, 6), format=format)
    return folder


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sign(folder: Path) -> None:
    """Makes manifests agree with the plan's configuration and digests, and with the files that are
    there, as far as they still are of the form for that."""
    try:
        plan = json.loads((folder / "plan.json").read_text())
        configuration = json.dumps(plan["configuration"], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(configuration.encode("utf-8", "surrogatepass")).hexdigest()
    except (ValueError, TypeError, KeyError):
        return
    for part in sorted(folder.glob("part-*")):
        try:
            manifest = json.loads((part / "manifest.json").read_text())
            manifest["configuration"] = digest
            manifest["digest"] = plan["partitions"][int(part.name[5:])]["digest"]
            for path in part.iterdir():
                if path.name in manifest["files"]:
                    content = path.read_bytes()
                    manifest["files"][path.name] = {
                        "bytes": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
        except (ValueError, TypeError, KeyError, IndexError):
            continue
        (part / "manifest.json").write_text(json.dumps(manifest))


def read_all(folder: Path) -> dict[str, Any]:
    """Everything there is to read of an output, checked against itself."""
    features = stellar_fast.open_features(folder)
    features.verify()
    repr(features)
    found: dict[str, Any] = {name: features[name].to_numpy() for name in features}
    for name, array in found.items():
        assert (array.shape, array.dtype) == (features[name].shape, features[name].dtype)
        some = [*range(len(array))][::2]
        np.testing.assert_array_equal(features[name][some], array[some])
    table = features.index
    assert table.num_rows == features.images
    assert features.ids_of(range(len(features))) == features.ids
    assert len(features.ids) == len(features)
    assert len(features.failed) == features.images - len(features)
    assert all(isinstance(id, str) for id in table["id"].to_pylist())
    return {**found, "ids": features.ids}


def outcome(folder: Path) -> dict[str, Any] | str:
    """What is read, or the one line that says why nothing is."""
    try:
        return read_all(folder)
    except StellarError as error:
        assert not isinstance(error.__cause__, MemoryError), error
        assert len(str(error)) < 2000
        return str(error)


def refused(folder: Path, *words: str) -> None:
    """Reading the folder is one error that has these words in it."""
    found = outcome(folder)
    assert isinstance(found, str), "it was read"
    for word in words:
        assert word in found


class Forger:
    """Changes one file of an output at random, again and again, and undoes it."""

    def __init__(self, original: Path, folder: Path, seed: int) -> None:
        shutil.copytree(original, folder)
        self._original, self.folder = original, folder
        self._random = random.Random(seed)

    def forge(self, name: str) -> None:
        """Changes the file at `name` below the folder."""
        path = self.folder / name
        content = (self._original / name).read_bytes()
        # A stranger need not keep to JSON, and mostly would.
        if path.suffix == ".json" and self._random.random() < 0.8:
            tree = json.loads(content)
            for _ in range(self._random.randint(1, 3)):
                self._graft(tree)
            path.write_text(json.dumps(tree))
        else:
            # Values of features may be anything: what is around them is forged.
            end = 128 if path.suffix == ".npy" else len(content)
            path.write_bytes(self._scramble(bytearray(content[:end])) + content[end:])
        if self._random.random() < 0.9:
            sign(self.folder)

    def undo(self) -> None:
        for path in self._original.rglob("*"):
            if path.is_file():
                shutil.copyfile(path, self.folder / path.relative_to(self._original))

    def _graft(self, tree: Any) -> None:
        """Replaces, removes or adds one value somewhere in a tree."""
        at = tree
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                return
            key = self._random.choice(keys)
            if not (isinstance(at[key], (dict, list)) and at[key] and self._random.random() < 0.8):
                break
            at = at[key]
        kind = self._random.random()
        if kind < 0.7:
            at[key] = self._weird()
        elif kind < 0.85:
            del at[key]
        elif isinstance(at, dict):
            at[self._random.choice(("x", "../x", "files", "rows"))] = self._weird()
        else:
            at.append(self._random.choice((copy.deepcopy(at[key]), self._weird())))

    def _weird(self) -> Any:
        return copy.deepcopy(self._random.choice(WEIRD))  # as it may be changed in its turn

    def _scramble(self, content: bytearray) -> bytes:
        pick = self._random
        for _ in range(pick.choice((1, 1, 2, 5, 20))):
            at = pick.randrange(len(content)) if content else 0
            kind = pick.random()
            if kind < 0.6 and content:
                content[at] = pick.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1 << pick.randrange(8))
                )
            elif kind < 0.75:
                content[at:at] = pick.randbytes(pick.randint(1, 9))
            elif kind < 0.9:
                del content[at : at + pick.randint(1, 9)]
            elif kind < 0.95:
                del content[at:]
            else:
                content[at : at + 4] = pick.choice((b"\xff\xff\xff\x7f", bytes(4), b"\xff" * 4))
        return bytes(content)
