"""Implementations of one model against each other, in turns, on inputs that are checked."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from harness.budgets import Entrant, Pool
from harness.results import Row, problem
from harness.timing import in_turns, rows_of
from harness.workloads import pictures
from peers.models import BASELINE, Subject


def pool_of(subject: Subject, count: int) -> Pool:
    """Images at the model's own size, with what is right and what plain PyTorch gives for them."""
    plain = {precision: subject.eager(precision) for precision in ("fp32", "bf16")}
    images = pictures(count, subject.config.backbone.image_size, 0)
    images = (images * 255).round() / 255  # the same as bytes
    reference = subject.reference("fp64")
    return Pool(subject.config.name, images, subject.eager("fp64"), plain, reference)


def race(pool: Pool, entrants: Sequence[Entrant], batch: int, sets: int, rounds: int) -> list[Row]:
    """Times the entrants, each warm, and checks all that they give; a row for each.

    Args:
        sets: how many sets of `batch` images the rounds rotate through.

    Returns:
        Rows with `speedup` against BASELINE or with `refused`: one that leaves its error budget on
        any input that it was timed on gets no figure.
    """
    worst: dict[str, dict[str, float]] = {entrant.name: {} for entrant in entrants}
    refused: dict[str, str] = {}

    def turn(entrant: Entrant, index: int) -> float:
        rows = pool.rows(batch, index % sets)
        entrant.load(pool.images[rows])
        seconds = entrant.run()
        errors, reason = pool.judge(entrant, entrant.fetch(), rows)
        for output, error in errors.items():
            before = worst[entrant.name].get(output, -1.0)
            worst[entrant.name][output] = before if error <= before else error  # NaN stays
        if reason is not None:
            refused.setdefault(entrant.name, reason)
        return seconds

    turns = {entrant.name: functools.partial(turn, entrant) for entrant in entrants}
    seconds, _ = in_turns(turns, least=rounds)
    timed = {row["name"]: row for row in rows_of(seconds)}
    found = []
    for entrant in entrants:
        name = entrant.name
        row: Row = {
            "stage": "encode",
            "key": f"{pool.model}/b{batch}",
            "name": name,
            "model": pool.model,
            "batch": batch,
            "precision": entrant.precision,
            "error": worst[name],
            **entrant.facts,
        }
        if name in refused:
            row["refused"] = refused[name]
        else:
            row |= timed[name]
            row["speedup"] = timed[BASELINE]["median"] / row["median"]
            row["images_per_second"] = batch / row["median"]
        found.append(row)
    return found


def report(rows: Sequence[Row]) -> Iterator[str]:
    """The rows of one batch for a terminal, fastest first, refused ones last."""
    yield f"{rows[0]['model']}, batch {rows[0]['batch']}"
    for row in sorted(rows, key=lambda row: row.get("median", float("inf"))):
        if reason := problem(row):
            yield f"  {row['name']:44} {reason}"
            continue
        yield (
            f"  {row['name']:44} {row['images_per_second']:8.2f} img/s {row['speedup']:6.2f}x  "
            f"({row['low']:.4f}-{row['high']:.4f} s a batch, {row['rounds']} rounds), "
            f"error {max(row['error'].values()):.1e}"
        )
