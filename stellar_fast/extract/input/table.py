"""What tables of images have in common: the column, its limits, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...printable import printable
from ..records import Value
from .addresses import scrubbed, shown

# What the column of paths may be called, where a table has several; and that of images themselves.
COLUMNS = ("path", "url", "file")
IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png")
MAX_LINES = 100_000_000
MAX_LINE = 64 << 10  # bytes of one path or address

# Of each line: its number, the path in it, and what is kept of it.
Lines = Iterator[tuple[int, str, list[Value]]]


def column_name(columns: list[str], name: str, wanted: str | None) -> str:
    usual = [column for column in COLUMNS if column in columns]
    usual = usual or [column for column in IMAGES if column in columns]
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted is None and len(usual) == 1:
        return usual[0]
    if wanted is None or wanted not in columns:
        problem = "which column has the paths?" if wanted is None else f"no column {wanted!r}"
        # A list without a first line of names has addresses there.
        known = ", ".join(shown(name)[:100] for name in columns[:20])
        raise ValueError(f"{name}: {problem} It has {known}; name one by --column")
    if columns.count(wanted) > 1:
        raise ValueError(
            f"{name}: has {columns.count(wanted)} columns {wanted!r}; rename the others"
        )
    return wanted


def said(error: Exception) -> str:
    """What Arrow says, without the row that it repeats."""
    return scrubbed(re.sub(r"(got \d+): .*", r"\1", str(error), flags=re.DOTALL), "")[:300]


def no_path(name: str, number: int, column: str) -> str:
    return f"{name}: line {number} has no path in the column {printable(column)!r}"


def no_paths(name: str, column: str, what: object) -> str:
    return (
        f"{name}: the column {printable(column)!r} holds {what}, not paths; name another by "
        "--column, or write the paths as text"
    )
