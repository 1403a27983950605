"""Machine code as cuobjdump prints it: its instructions, its loops, and what a warp issues."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Matrix instructions: warp-wide (HMMA, QMMA), of four warps (HGMMA, QGMMA), of one thread (UTC…).
MATRIX = re.compile(r"^(?:U?T?C?[HQ]G?MMA|[HQ]MMA)")
_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);", re.ASCII)
_CONDITION = re.compile(r"^\s*!?U?P\w+\s*,")  # of a branch, where it is an operand
STORES = ("STG", "UTMASTG")
EPILOGUE = 64  # instructions, at least, that are more than bookkeeping
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")

# What carries out an instruction, and for how many cycles one of a multiprocessor's four schedulers
# is kept from giving it another (CUDA C++ Programming Guide, throughput of native instructions):
# special functions have 4 lanes a scheduler, loads and stores share one path of 32 lanes among the
# four, integers and comparisons have 16 lanes, float32 has 32 but on sm_80, where it has 16.
_SPECIAL = {"MUFU", "F2F", "I2F", "F2I"}
_MEMORY = {"LDS", "LDSM", "STS", "STSM", "LDG", "STG", "LDGSTS", "SHFL", "ATOMG", "RED"}
_FLOAT = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "IMAD", "HFMA2"}
_FREE = {"NOP", "BRA", "EXIT", "BAR", "SYNCS", "WARPSYNC", "DEPBAR", "WARPGROUP"}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        target: the address that a branch goes to.
        operands: as they are printed.
        guarded: whether it may be skipped, or a branch not be taken.
    """

    address: int
    name: str
    target: int | None
    operands: str = ""
    guarded: bool = False

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]


def parse(text: str) -> list[Instruction]:
    """The instructions of cuobjdump's -sass listing."""
    found = []
    for address, guard, name, operands in _LINE.findall(text):
        target = _TARGET.search(operands.strip()) if name.startswith("BRA") else None
        guarded = bool(guard) or (target is not None and bool(_CONDITION.match(operands)))
        goes = int(target.group(1), 16) if target else None
        found.append(Instruction(int(address, 16), name, goes, operands.strip(), guarded))
    return found


@dataclass(frozen=True)
class Anatomy:
    """Cycles of a scheduler that one warp takes, matrix instructions left out.

    The main loop is the innermost one that has matrix instructions or, without any, many fused
    multiply-adds of float32. What a flattened persistent loop skips but at the end of a tile counts
    for the tile.

    Attributes:
        loop: in one pass of the main loop.
        tile: beside it, for one tile; of a kernel without such a loop, everything.
        flattened: whether the loop over tiles and the one along them are one.
        matrix: matrix instructions of one pass, by name.
    """

    loop: int
    tile: int
    flattened: bool
    matrix: dict[str, int]


def cycles(instructions: Iterable[Instruction], arch: int) -> int:
    """Of a scheduler, for one warp: of the busiest of its pipes."""
    kinds = Counter(
        item.kind for item in instructions if item.kind not in _FREE and not MATRIX.match(item.name)
    )
    special = sum(count for kind, count in kinds.items() if kind in _SPECIAL)
    memory = sum(count for kind, count in kinds.items() if kind in _MEMORY)
    float32 = sum(count for kind, count in kinds.items() if kind in _FLOAT)
    issued = kinds.total()
    uniform = sum(count for kind, count in kinds.items() if kind.startswith(("U", "R2U", "CS2R")))
    integer = issued - special - memory - float32 - uniform
    return max(issued, 8 * special, 4 * memory, (2 if arch == 80 else 1) * float32, 2 * integer)


def _has_matrix(items: Iterable[Instruction]) -> bool:
    return any(MATRIX.match(item.name) for item in items)


def _between(items: list[Instruction], first: int, last: int) -> list[Instruction]:
    return [item for item in items if first <= item.address <= last]


def _skipped(body: list[Instruction]) -> list[Instruction]:
    """Of a loop's body: what a branch without matrix instructions behind it goes around."""
    addresses: set[int] = set()
    for branch in body:
        if branch.target is None or not branch.address < branch.target <= body[-1].address:
            continue
        region = _between(body, branch.address + 1, branch.target - 1)
        if len(region) >= EPILOGUE and not _has_matrix(region):
            addresses |= {item.address for item in region}
    return [item for item in body if item.address in addresses]


@dataclass(frozen=True)
class Layout:
    """The parts of a kernel that goes on from tile to tile, or of one that has a single tile.

    Attributes:
        loop: the main loop.
        tile: what is done beside it for each tile, in front of it and behind.
        flattened: whether the loop over tiles and the one along them are one.
    """

    loop: list[Instruction]
    tile: list[Instruction]
    flattened: bool


def layout(instructions: list[Instruction]) -> Layout:
    """Where the main loop of a kernel is, as `Anatomy` has it."""
    bodies = [
        _between(instructions, branch.target, branch.address)
        for before, branch in zip([None, *instructions], instructions, strict=False)
        if branch.target is not None
        and branch.target < branch.address
        # Not back from where a wait is tried again, a loop of two behind the kernel's end.
        and not (before and before.target is not None and before.target < before.address)
    ]
    working = [body for body in bodies if _has_matrix(body)] or [
        body for body in bodies if sum(item.kind == "FFMA" for item in body) >= EPILOGUE
    ]
    body = min(working, key=len, default=[])
    tile = _skipped(body)
    if tile:
        skipped = {item.address for item in tile}
        body = [item for item in body if item.address not in skipped]
        flattened = True
    else:
        around = [other for other in bodies if len(other) > len(body) and body and
                  other[0].address <= body[0].address and other[-1].address >= body[-1].address
                  and any(item.kind in STORES for item in other)]  # fmt: skip
        outer = min(around, key=len, default=instructions)  # that over tiles, not over chunks
        here = {item.address for item in body}
        tile = [item for item in outer if item.address not in here]
        flattened = False
    return Layout(body, tile, flattened)


def anatomy(instructions: list[Instruction], arch: int) -> Anatomy:
    """What the machine code of one kernel issues."""
    found = layout(instructions)
    return Anatomy(
        loop=cycles(found.loop, arch),
        tile=cycles(found.tile, arch),
        flattened=found.flattened,
        matrix=dict(Counter(item.name for item in found.loop if MATRIX.match(item.name))),
    )
