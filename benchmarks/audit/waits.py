"""What a warp waits for: loads that follow one another, and how deep its pipelines are.

A warp issues in order. A load goes on while later instructions issue, until one of them needs what
it brings: a register, a barrier that its bytes complete (TMA), or a group of asynchronous copies
(LDGSTS). There the warp stands still for a trip to the memory, and what it loads behind that is
another trip. Branches around a part count as not taken, retries of a wait as not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from audit.machine_code import MATRIX, Instruction, layout

_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_GROUPS_LEFT = re.compile(r"0x([0-9a-f]+)$")
# 32-bit registers that an instruction's name says of its value.
_WIDTHS = {"64": 2, "128": 4, "256": 8}
_TMA, _COPIES = "tma", "copies"


@dataclass(frozen=True)
class Waits:
    """Trips to the memory that a warp waits for one after another, and what is under way meanwhile.

    Attributes:
        before: trips from the start of the program to its main loop, the loop's own first wait
            left out.
        each: trips of one pass of the main loop whose loads that same pass has issued.
        after: trips of a tile behind its main loop; of a kernel without one, everything.
        under_way: passes of the main loop whose loads are under way when a pass begins its
            products; None without asynchronous loads.
        products: groups of matrix instructions that may be unfinished when a pass waits for the one
            before it; None where the hardware has no such wait.
    """

    before: int
    each: int
    after: int
    under_way: int | None
    products: int | None


def _width(name: str) -> int:
    return next((_WIDTHS[part] for part in name.split(".")[1:] if part in _WIDTHS), 1)


def _touched(item: Instruction) -> set[int]:
    """Registers that an instruction reads or writes: those named, and those that follow them."""
    found: set[int] = set()
    width = _width(item.name)
    for number, pair in _REGISTER.findall(item.operands):
        found.update(range(int(number), int(number) + (2 if pair else width)))
    return found


def trips(instructions: Iterable[Instruction]) -> int:
    """How often a warp stands still for loads that these instructions issue, in their order."""
    pending: dict[object, None] = {}  # registers, and kinds of asynchronous loads
    count = 0
    for item in instructions:
        waits = False
        if item.kind == "SYNCS" and "TRYWAIT" in item.name:
            waits = _TMA in pending
        elif item.kind == "DEPBAR" and _COPIES in pending:
            left = _GROUPS_LEFT.search(item.operands)
            waits = left is None or int(left.group(1), 16) == 0
        elif pending:
            waits = not pending.keys().isdisjoint(_touched(item))
        if waits:
            count += 1
            pending.clear()
        if item.kind == "LDG":
            first = _REGISTER.search(item.operands)
            if first is not None:
                start = int(first.group(1))
                pending.update(dict.fromkeys(range(start, start + _width(item.name))))
        elif item.kind == "UTMALDG":
            pending[_TMA] = None
        elif item.kind == "LDGSTS":
            pending[_COPIES] = None
    return count


def _leading_to(instructions: list[Instruction], address: int) -> list[Instruction]:
    """What lies in front of `address` and may come before it in a run of the program."""
    place = {item.address: index for index, item in enumerate(instructions)}
    before: dict[int, list[int]] = {}
    for index, item in enumerate(instructions):
        ends = item.kind in ("EXIT", "RET") or item.target is not None
        if (item.guarded or not ends) and index + 1 < len(instructions):
            before.setdefault(index + 1, []).append(index)
        if item.target is not None and item.target in place:
            before.setdefault(place[item.target], []).append(index)
    seen: set[int] = set()
    left = [place[address]]
    while left:
        for index in before.get(left.pop(), ()):
            if index not in seen:
                seen.add(index)
                left.append(index)
    return [instructions[i] for i in sorted(seen) if instructions[i].address < address]


def waits(instructions: list[Instruction]) -> Waits:
    """What the machine code of one kernel waits for."""
    found = layout(instructions)
    loop = found.loop
    if not loop:
        return Waits(0, 0, trips(instructions), None, None)
    start, end = loop[0].address, loop[-1].address
    front = _leading_to(instructions, start)
    behind = [item for item in found.tile if found.flattened or item.address > end]
    products = [
        int(left.group(1), 16)
        for item in loop
        if item.name.startswith("WARPGROUP.DEPBAR") and (left := _GROUPS_LEFT.search(item.operands))
    ]
    return Waits(
        before=trips(front),
        each=trips(loop),
        after=trips(behind),
        under_way=_under_way(front, loop),
        products=min(products, default=None),
    )


def _under_way(front: list[Instruction], loop: list[Instruction]) -> int | None:
    """Passes whose loads are under way at a pass's first product, the one it needs left out."""
    first = next((n for n, item in enumerate(loop) if MATRIX.match(item.name)), len(loop))
    groups = [item for item in loop[:first] if item.kind == "DEPBAR"]
    if any(item.kind == "LDGSTS" for item in loop):
        left = [m for item in groups if (m := _GROUPS_LEFT.search(item.operands))]
        # A group is the loads of a pass, or of one of its operands.
        each = max(1, sum(item.kind == "LDGDEPBAR" for item in loop))
        return min((int(m.group(1), 16) for m in left), default=0) // each
    count = sum(item.kind == "UTMALDG" for item in loop)
    if not count:
        return None
    ahead = sum(item.kind == "UTMALDG" for item in front)
    return max(0, ahead // count - 1 + sum(x.kind == "UTMALDG" for x in loop[:first]) // count)
