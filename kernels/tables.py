"""Launch tables that were tuned on a GPU: `tuned/sm_XX.json`, written by `benchmarks/gpu/tune.py`.

A table says which tiles won for the shapes that were measured, and where and when. What it does not
have is left to the heuristics beside each kernel. Tiles that batches of different sizes choose
between are of one family: the same rows, warps and way of summing, so that no result depends on the
batch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"
ORIGIN = ("device", "date", "commit", "versions", "command")


@dataclass(frozen=True)
class Tile:
    """One program of a matrix kernel: block_m x block_n outputs, in steps of block_k.

    Attributes:
        slices: column slices in which the epilogue finishes the accumulator.
        residents: programs side by side on a multiprocessor: while one finishes a tile, the other
            multiplies.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    slices: int = 1
    residents: int = 1

    @property
    def family(self) -> bool:
        """What tiles must share for one row to be computed alike by all of them.

        Every instruction of a warp then takes 16 whole rows of the tile, whose sums have one order.
        """
        return self.block_m >= 16 * self.num_warps


@dataclass(frozen=True)
class AttentionTile:
    """One step of an attention program: block_q query rows against block_k keys.

    Attributes:
        resident: whether all keys and values of a head stay in shared memory.
        registers: of a thread, at most; None leaves it to the assembler.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    resident: bool
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


@dataclass(frozen=True)
class Table:
    """What was tuned on one GPU generation.

    Attributes:
        linear: by dtype, columns and depth of a product: tiles, each from a number of rows on, in
            ascending order.
        attention: by dtype, length and head_dim.
    """

    linear: Mapping[tuple[str, int, int], tuple[tuple[int, Tile], ...]] = field(
        default_factory=dict
    )
    attention: Mapping[tuple[str, int, int], AttentionTile] = field(default_factory=dict)

    def linear_tile(self, dtype: str, rows: int, columns: int, depth: int) -> Tile | None:
        """The tile for this many rows, or None where the shape was not tuned."""
        tiles = self.linear.get((dtype, columns, depth), ())
        return next((tile for first, tile in reversed(tiles) if rows >= first), None)


EMPTY = Table()


def _made(kind: type, fields: Mapping[str, Any]) -> Any:
    """A tile of the fields of a JSON object, each of its declared type."""
    known = {item.name: item for item in dataclasses.fields(kind)}
    needed = {name for name, item in known.items() if item.default is dataclasses.MISSING}
    if not needed <= set(fields) <= set(known):
        raise ValueError(f"a tile has the fields {', '.join(known)}, not {', '.join(fields)}")
    for name, value in fields.items():
        if value is None and known[name].default is None:
            continue
        if isinstance(value, bool) != ("bool" in str(known[name].type)):
            raise ValueError(f"{name} is {value!r}")
        sizes = name.startswith("block_") or name in ("num_warps", "slices", "residents")
        if not isinstance(value, int) or value < 0 or (sizes and value.bit_count() != 1):
            raise ValueError(f"{name} is {value!r}, which no kernel takes")
    return kind(**fields)


def _linear(entries: list[dict[str, Any]]) -> dict[tuple[str, int, int], tuple]:
    found = {}
    for entry in entries:
        key = (entry["dtype"], entry["columns"], entry["depth"])
        tiles = tuple(
            (item["rows"], _made(Tile, {k: v for k, v in item.items() if k != "rows"}))
            for item in entry["tiles"]
        )
        firsts = [first for first, _ in tiles]
        if not firsts or firsts[0] != 1 or firsts != sorted(set(firsts)):
            raise ValueError(f"the rows of {key} are {firsts}, not ascending from 1")
        if len({tile.family for _, tile in tiles}) > 1:
            raise ValueError(f"the tiles of {key} are not of one family")
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = tiles
    return found


def parsed(content: Any, arch: int) -> Table:
    """The table of a JSON document.

    Raises:
        ValueError: it is not a table, or not one of this GPU.
    """
    try:
        unknown = set(content) - {"arch", "linear", "attention", *ORIGIN}
        missing = {"arch", "linear", "attention", *ORIGIN} - set(content)
        if unknown or missing:
            raise ValueError(f"unknown {sorted(unknown)}, missing {sorted(missing)}")
        if content["arch"] != arch:
            raise ValueError(f"it was tuned on sm_{content['arch']}")
        attention = {}
        for entry in content["attention"]:
            fields = dict(entry)
            key = (fields.pop("dtype"), fields.pop("length"), fields.pop("head_dim"))
            if key in attention:
                raise ValueError(f"{key} is there twice")
            attention[key] = _made(AttentionTile, fields)
        return Table(_linear(content["linear"]), attention)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks what a table has: {error!r}") from error


@lru_cache
def table(arch: int, folder: Path = FOLDER) -> Table:
    """The table of a GPU generation; an empty one where none was tuned.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / f"sm_{arch}.json"
    if not path.exists():
        return EMPTY
    try:
        return parsed(json.loads(path.read_text()), arch)
    except ValueError as error:
        raise ValueError(
            f"launch table {path}: {error}; delete it or write it anew with benchmarks/gpu/tune.py"
        ) from error
