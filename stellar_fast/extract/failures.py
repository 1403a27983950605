"""Why images failed, counted for a person to read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .output.index import read_index
from .output.layout import complete, read_plan
from .records import PathLike

EXAMPLES = 3
REASONS = 5  # that are told; the most frequent
MOST_PARTITIONS = 1000  # whose index is read: each takes some milliseconds


def told_failures(output: PathLike, *, held: bool = True) -> Iterator[str]:
    """Lines that say how many images failed for which reasons, each with some of them.

    Reasons that differ in numbers alone are one.

    Args:
        held: see `read_manifest`.

    Raises:
        StellarError: the output cannot be read.
    """
    folder, plan = Path(output), read_plan(output)
    found = complete(folder, plan, held=held)
    failed = [(at, manifest) for at, manifest in found.items() if manifest["failed"]]
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for at, manifest in failed[:MOST_PARTITIONS]:
        table = read_index(folder / plan.partitions[at].name, manifest)
        for id, reason in zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True):
            if reason is None:
                continue
            kind = re.sub(r"\b\d+", "N", reason)
            counts[kind] += 1
            known = examples.setdefault(kind, [])
            if len(known) < EXAMPLES:
                known.append(id)
    for kind, count in counts.most_common(REASONS):
        more = ", ..." if count > EXAMPLES else ""
        yield f"  {count} {kind}: {', '.join(examples[kind])}{more}"
    rest = counts.total() - sum(count for _, count in counts.most_common(REASONS))
    if rest:
        yield f"  {rest} for {len(counts) - REASONS} other reasons"
    if len(failed) > MOST_PARTITIONS:
        yield f"  and those of {len(failed) - MOST_PARTITIONS} more partitions"
