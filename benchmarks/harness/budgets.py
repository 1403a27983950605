"""Implementations of one model against each other, in turns, on inputs that are checked.

A figure is what passed its error budget: an entrant that leaves it on any input that it was timed
on is refused, and its row says why instead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import harness
import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]
Encode = Callable[[Tensor], Outputs]
BASELINE = "reference fp32 eager"
OURS = "engine "  # how the names of our own rows begin


class Entrant(Protocol):
    """One implementation, in this process or in another.

    Attributes:
        precision: whose error budget it must keep, "fp32" or "bf16".
        facts: further fields of its row.
    """

    name: str
    precision: str
    facts: Mapping[str, object]

    def load(self, images: Tensor) -> None:
        """Takes the input of the next runs, (B, 3, H, W) float32."""

    def run(self) -> float:
        """Encodes it once: seconds."""

    def fetch(self) -> Outputs:
        """What the last run gave."""

    def exact(self, images: Tensor) -> Outputs | None:
        """Its own float64 outputs, if it computes something else than the model, else None."""


@dataclass
class Local:
    """An entrant in this process."""

    name: str
    precision: str
    encode: Encode
    facts: Mapping[str, object] = field(default_factory=dict)

    def load(self, images: Tensor) -> None:
        self._images = images

    def run(self) -> float:
        start = time.perf_counter()
        self._found = self.encode(self._images)
        return time.perf_counter() - start

    def fetch(self) -> Outputs:
        return self._found

    def exact(self, images: Tensor) -> None:
        return None


class Pool:
    """Images, and what is right for each of them; batches are cut from it.

    An image's features do not depend on its batch, so float64 runs once over the pool.

    Args:
        model: its name.
        images: (N, 3, H, W) float32.
        exact: the model in float64.
        plain: plain PyTorch by precision; twice its error is the budget.
    """

    CHUNK = 8

    def __init__(
        self, model: str, images: Tensor, exact: Encode, plain: Mapping[str, Encode]
    ) -> None:
        self.model, self.images = model, images
        self.exact = self.over(exact)
        self.plain = {precision: self.over(encode) for precision, encode in plain.items()}
        self._own: dict[str, Outputs] = {}
        self._budgets: dict[tuple, dict[str, float]] = {}

    def over(self, encode: Encode) -> Outputs:
        """The outputs for every image of the pool, computed in chunks."""
        parts = [encode(chunk) for chunk in self.images.split(self.CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rows(self, batch: int, index: int) -> Tensor:
        """Which images make up set number `index`: neighbours, around the end."""
        return (torch.arange(batch) + index * batch) % len(self.images)

    def judge(self, entrant: Entrant, found: Outputs, rows: Tensor) -> tuple[dict, str | None]:
        """The errors of what an entrant found for these rows, and why it is refused, if it is."""
        truth = self.exact
        budget = self._budget(entrant.precision, rows)
        if (own := self._own_truth(entrant)) is not None:
            truth, budget = own, dict.fromkeys(own, budget["dense"])
        errors = harness.errors(found, {name: value[rows] for name, value in truth.items()})
        return errors, harness.over_budget(errors, budget)

    def _budget(self, precision: str, rows: Tensor) -> dict[str, float]:
        key = (precision, tuple(rows.tolist()))
        if key not in self._budgets:
            plain = {name: value[rows] for name, value in self.plain[precision].items()}
            truth = {name: value[rows] for name, value in self.exact.items()}
            self._budgets[key] = harness.errors(plain, truth)
        return self._budgets[key]

    def _own_truth(self, entrant: Entrant) -> Outputs | None:
        if entrant.name not in self._own:
            if entrant.exact(self.images[:1]) is None:
                return None
            self._own[entrant.name] = self.over(lambda images: entrant.exact(images) or {})
        return self._own[entrant.name]


def pictures(batch: int, side: int, seed: int) -> Tensor:
    """(batch, 3, side, side) in [0, 1], smooth with noise: zeros would flatter everyone."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 14, 14, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    noise = torch.rand(batch, 3, side, side, generator=generator)
    return (0.8 * smooth + 0.2 * noise).clamp(0, 1)


class Contest:
    """Times the entrants in turns, in another order each round.

    Args:
        entrants: each warm: it has run at this shape.
        sets: how many sets of `batch` images the rounds rotate through.
    """

    def __init__(
        self, pool: Pool, entrants: Sequence[Entrant], batch: int, sets: int, rounds: int
    ) -> None:
        self.pool, self.batch, self.sets = pool, batch, sets
        self.entrants = {entrant.name: entrant for entrant in entrants}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.entrants}
        self.worst: dict[str, dict[str, float]] = {name: {} for name in self.entrants}
        self.refused: dict[str, str] = {}
        order = random.Random(0)
        names = list(self.entrants)
        self._schedule = [
            (name, index) for index in range(rounds) for name in order.sample(names, len(names))
        ]

    def turn(self, name: str, index: int) -> None:
        """A timed call of an entrant on the inputs of one round, and its check."""
        self._load(name, index)
        self._run(name)
        self._check(name, index)

    def _load(self, name: str, index: int) -> None:
        rows = self.pool.rows(self.batch, index % self.sets)
        self.entrants[name].load(self.pool.images[rows])

    def _run(self, name: str) -> None:
        self.seconds[name].append(self.entrants[name].run())

    def _check(self, name: str, index: int) -> None:
        entrant = self.entrants[name]
        rows = self.pool.rows(self.batch, index % self.sets)
        errors, reason = self.pool.judge(entrant, entrant.fetch(), rows)
        worst = self.worst[name]
        for output, error in errors.items():
            # NaN stays: it is neither above nor below.
            worst[output] = error if not error <= worst.get(output, -1.0) else worst[output]
        if reason is not None:
            self.refused.setdefault(name, reason)

    def until(self, name: str) -> None:
        """Every scheduled turn up to the next one of `name`, which the caller runs by `next`."""
        while self._schedule and self._schedule[0][0] != name:
            self.turn(*self._schedule.pop(0))
        self._load(*self._schedule[0])

    def next(self) -> None:
        """The call that `until` left; `done` follows."""
        self._run(self._schedule[0][0])

    def done(self) -> None:
        self._check(*self._schedule.pop(0))

    def finish(self) -> None:
        """Every turn that is left."""
        while self._schedule:
            self.turn(*self._schedule.pop(0))

    def rows(self) -> list[dict[str, object]]:
        """A row an entrant, with `speedup` against the baseline or with `refused`."""
        base = harness.Timing.of(self.seconds[BASELINE]).median
        rows = []
        for name, entrant in self.entrants.items():
            facts = {
                "name": name,
                "model": self.pool.model,
                "batch": self.batch,
                "precision": entrant.precision,
                "error": self.worst[name],
                **entrant.facts,
            }
            if name in self.refused:
                rows.append({**facts, "refused": self.refused[name]})
                continue
            timing = harness.Timing.of(self.seconds[name])
            rows.append(harness.row(timing, self.batch, **facts, speedup=base / timing.median))
        return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows for a terminal, fastest first, refused ones last."""
    order = sorted(rows, key=lambda row: (row["batch"], row.get("median", float("inf"))))
    lines, batch = [], None
    for row in order:
        if row["batch"] != batch:
            batch = row["batch"]
            lines.append(f"{row['model']}, batch {batch}")
        if "refused" in row:
            lines.append(f"  {row['name']:44} refused: {row['refused']}")
        else:
            lines.append(
                f"  {row['name']:44} {row['images_per_second']:8.2f} img/s {row['speedup']:6.2f}x  "
                f"({row['low']:.4f}-{row['high']:.4f} s a batch, {row['rounds']} rounds)"
            )
    return lines
