"""Implementations of one model against each other, in turns, on inputs that are checked.

A figure is what passed its error budget: an entrant that leaves it on any input that it was timed
on is refused, and its row says why instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]
Encode = Callable[[Tensor], Outputs]
BASELINE = "reference fp32 eager"
OURS = "engine "  # how the names of our own rows begin


@dataclass(frozen=True)
class Entrant:
    """One implementation.

    Attributes:
        precision: whose error budget it must keep, "fp32" or "bf16".
        encode: images (B, 3, H, W) float32 to named outputs.
        exact: its own float64 outputs, where it computes something else than the model; its budget
            is then the one of "dense".
        facts: further fields of its row, such as seconds to prepare.
    """

    name: str
    precision: str
    encode: Encode
    exact: Encode | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Inputs, and what decides whether outputs on them are right.

    Attributes:
        inputs: sets of images, each (B, 3, H, W) float32.
        exact: the float64 outputs for each set.
        plain: for each precision and set, the errors of plain PyTorch at that dtype.
    """

    model: str
    inputs: Sequence[Tensor]
    exact: Sequence[Outputs]
    plain: Mapping[str, Sequence[Mapping[str, float]]]

    @classmethod
    def of(
        cls,
        model: str,
        inputs: Sequence[Tensor],
        exact: Encode,
        plain: Mapping[str, Encode],
    ) -> Task:
        truths = [exact(images) for images in inputs]
        errors = {
            precision: [
                harness.errors(encode(images), truth)
                for images, truth in zip(inputs, truths, strict=True)
            ]
            for precision, encode in plain.items()
        }
        return cls(model, inputs, truths, errors)

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0]


def pictures(batch: int, side: int, seed: int) -> Tensor:
    """(batch, 3, side, side) in [0, 1], smooth with noise: zeros would flatter everyone."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 14, 14, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    noise = torch.rand(batch, 3, side, side, generator=generator)
    return (0.8 * smooth + 0.2 * noise).clamp(0, 1)


class Contest:
    """Times the entrants in turns; construction warms each up and refuses those that are wrong."""

    def __init__(self, task: Task, entrants: Sequence[Entrant]) -> None:
        self.task = task
        self.entrants = {entrant.name: entrant for entrant in entrants}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.entrants}
        self.worst: dict[str, dict[str, float]] = {name: {} for name in self.entrants}
        self.refused: dict[str, str] = {}
        self._own: dict[tuple[str, int], Outputs] = {}
        self._found: dict[str, tuple[int, Outputs]] = {}
        self._rounds = 0
        for name, entrant in self.entrants.items():
            self._found[name] = (0, entrant.encode(task.inputs[0]))
            self.check()

    def turn(self, name: str) -> None:
        """One timed call of an entrant, on the inputs of this round."""
        index = self._rounds % len(self.task.inputs)
        images = self.task.inputs[index]
        encode = self.entrants[name].encode
        start = time.perf_counter()
        found = encode(images)
        self.seconds[name].append(time.perf_counter() - start)
        self._found[name] = (index, found)

    def round(self, without: str | None = None) -> None:
        """A turn of each that is not refused; `without` has its turn next, by the caller."""
        self.check()
        self._rounds += 1
        for name in self.entrants:
            if name not in self.refused and name != without:
                self.turn(name)

    def check(self) -> None:
        """Holds the outputs of the last turns against float64, outside of any timing."""
        for name, (index, found) in self._found.items():
            entrant, plain = self.entrants[name], self.task.plain
            truth, budget = self.task.exact[index], plain[entrant.precision][index]
            if entrant.exact is not None:
                truth = self._own_truth(entrant, index)
                budget = dict.fromkeys(truth, budget["dense"])
            errors = harness.errors(found, truth)
            worst = self.worst[name]
            for output, error in errors.items():
                worst[output] = error if output not in worst else max(worst[output], error)
            if reason := harness.over_budget(errors, budget):
                self.refused.setdefault(name, reason)
        self._found.clear()

    def _own_truth(self, entrant: Entrant, index: int) -> Outputs:
        assert entrant.exact is not None
        if (entrant.name, index) not in self._own:
            self._own[entrant.name, index] = entrant.exact(self.task.inputs[index])
        return self._own[entrant.name, index]

    def rows(self) -> list[dict[str, object]]:
        """A row an entrant, with `speedup` against the baseline or with `refused`."""
        self.check()
        base = harness.Timing.of(self.seconds[BASELINE]).median
        rows = []
        for name, entrant in self.entrants.items():
            facts = {
                "name": name,
                "model": self.task.model,
                "batch": self.task.batch,
                "precision": entrant.precision,
                "error": self.worst[name],
                **entrant.facts,
            }
            if name in self.refused:
                rows.append({**facts, "refused": self.refused[name]})
                continue
            timing = harness.Timing.of(self.seconds[name])
            rows.append(harness.row(timing, self.task.batch, **facts, speedup=base / timing.median))
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
            lines.append(f"  {row['name']:36} refused: {row['refused']}")
        else:
            lines.append(
                f"  {row['name']:36} {row['images_per_second']:8.2f} img/s {row['speedup']:6.2f}x  "
                f"({row['low']:.4f}-{row['high']:.4f} s a batch, {row['rounds']} rounds)"
            )
    return lines
