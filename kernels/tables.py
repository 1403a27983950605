"""Launch tables that were tuned on a GPU: `tuned/sm_XX.json`, written by `benchmarks/gpu/tune.py`.

A table says which tiles won for the shapes that were measured, and where and when. What it does not
have is left to the heuristics beside each kernel. Tiles that batches of different sizes choose
between are of one family and gave the same bits where they were measured, so that no result depends
on the batch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

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
        registers: of a thread, at most; None leaves it to the assembler.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def family(self) -> int:
        """What tiles must share for one row to be computed alike by all of them."""
        return self.block_k

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


AnyTile = TypeVar("AnyTile", Tile, AttentionTile)
Tiles = tuple[tuple[int, AnyTile], ...]
Shape = tuple[str, int, int]


@dataclass(frozen=True, eq=False)  # plans are kept by it
class Table:
    """What was tuned on one GPU generation.

    Attributes:
        linear: by dtype, columns and depth of a product: tiles, each from a number of rows on, in
            ascending order.
        attention: by dtype, length and head_dim: the same, by the rows of all images.
    """

    linear: Mapping[Shape, Tiles[Tile]] = field(default_factory=dict)
    attention: Mapping[Shape, Tiles[AttentionTile]] = field(default_factory=dict)

    def linear_tile(self, dtype: str, rows: int, columns: int, depth: int) -> Tile | None:
        """The tile for this many rows, or None where the shape was not tuned."""
        return _from(self.linear, dtype, rows, columns, depth)

    def attention_tile(
        self, dtype: str, rows: int, length: int, head_dim: int
    ) -> AttentionTile | None:
        """The same for attention."""
        return _from(self.attention, dtype, rows, length, head_dim)


def _from(
    tiles: Mapping[Shape, Tiles[AnyTile]], dtype: str, rows: int, first: int, second: int
) -> AnyTile | None:
    # float16 is as wide as bfloat16, and goes through the same units at the same speed.
    found = tiles.get(("bf16" if dtype == "fp16" else dtype, first, second), ())
    return next((tile for least, tile in reversed(found) if rows >= least), None)


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


def _tiles(entries: list[dict[str, Any]], kind: type, names: tuple[str, str]) -> dict:
    found: dict[Shape, Any] = {}
    for entry in entries:
        key = (entry["dtype"], *(entry[name] for name in names))
        tiles = tuple(
            (item["rows"], _made(kind, {k: v for k, v in item.items() if k != "rows"}))
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
        return Table(
            _tiles(content["linear"], Tile, ("columns", "depth")),
            _tiles(content["attention"], AttentionTile, ("length", "head_dim")),
        )
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
