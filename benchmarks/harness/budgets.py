"""Who gets a figure: errors against float64, held to twice those of plain PyTorch, or to twice what
rounding entitles to, where plain PyTorch was lucky."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from harness.rounding import entitlement, relative_error
from harness.workloads import DTYPES, Case, op_of
from torch import Tensor, nn

from stellar_fast.reference import ops as oracles

Outputs = Mapping[str, Tensor]
Encode = Callable[[Tensor], Outputs]


def errors_of(found: Outputs, exact: Outputs) -> dict[str, float]:
    """The relative error of each output; an output that is missing is an AssertionError."""
    for name in exact:
        assert name in found, f"{name}: no such output"
    return {name: relative_error(found[name], exact[name]) for name in exact}


def over_budget(measured: Mapping[str, float], plain: Mapping[str, float]) -> str | None:
    """The first error that exceeds twice plain PyTorch's at that dtype, in words."""
    for name, error in measured.items():
        budget = 2 * plain[name]
        if not error <= budget or math.isinf(error):  # nor is NaN
            return f"{name}: error {error:.2e} exceeds its budget {budget:.2e}"
    return None


class Entrant(Protocol):
    """One implementation of the model, in this process or in another.

    Attributes:
        precision: whose error budget it must keep, "fp32" or "bf16"; int8 has none of its own: what
            counts is whose error is the smaller.
        outputs: what it gives.
        facts: further fields of its row.
    """

    name: str
    precision: str
    outputs: Sequence[str]
    facts: Mapping[str, object]

    def load(self, images: Tensor) -> None:
        """Takes the input of the next runs, (B, 3, H, W) float32."""

    def run(self) -> float:
        """Encodes it once: seconds."""

    def fetch(self) -> Outputs:
        """What the last run gave."""

    def exact(self, images: Tensor) -> Outputs | None:
        """Its own float64 outputs, if it computes something else than the model, else None."""


class Pool:
    """Images, and what is right for each of them; batches are cut from it.

    An image's features do not depend on its batch, so float64 runs once over the pool.

    Args:
        model: its name.
        images: (N, 3, H, W) float32.
        exact: the model in float64.
        plain: plain PyTorch by precision.
        reference: the module whose parameters `exact` reads.
    """

    CHUNK = 8
    SOUND = 4  # images whose roundings are drawn: four draws of each are evaluated in float64

    def __init__(
        self,
        model: str,
        images: Tensor,
        exact: Encode,
        plain: Mapping[str, Encode],
        reference: nn.Module,
    ) -> None:
        self.model, self.images = model, images
        self._evaluate, self._reference = exact, reference
        self.exact = self.over(exact)
        self.plain = {precision: self.over(encode) for precision, encode in plain.items()}
        self._own: dict[str, Outputs] = {}
        self._budgets: dict[tuple, dict[str, float]] = {}

    def over(self, encode: Encode) -> Outputs:
        """The outputs for every image of the pool, computed in chunks."""
        chunks = [encode(chunk) for chunk in self.images.split(self.CHUNK)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def rows(self, batch: int, index: int) -> Tensor:
        """Which images make up set number `index`: neighbours, around the end."""
        return (torch.arange(batch) + index * batch) % len(self.images)

    def judge(self, entrant: Entrant, found: Outputs, rows: Tensor) -> tuple[dict, str | None]:
        """The errors of what an entrant found for these rows, and why it is refused, if it is."""
        truth: Outputs = {name: self.exact[name] for name in entrant.outputs}
        budget = self._budget(entrant.precision, rows)
        if (own := self._own_truth(entrant)) is not None:
            truth, budget = own, dict.fromkeys(own, budget["dense"])
        found_errors = errors_of(found, {name: value[rows] for name, value in truth.items()})
        return found_errors, over_budget(found_errors, budget)

    def _budget(self, precision: str, rows: Tensor) -> dict[str, float]:
        if precision not in self.plain:
            return dict.fromkeys(self.exact, math.inf)
        key = (precision, tuple(rows.tolist()))
        if key not in self._budgets:
            plain = {name: value[rows] for name, value in self.plain[precision].items()}
            truth = {name: value[rows] for name, value in self.exact.items()}
            near, sound = errors_of(plain, truth), self._sound(precision)
            self._budgets[key] = {name: max(near[name], sound[name]) for name in near}
        return self._budgets[key]

    @functools.cache  # noqa: B019 (a pool lives as long as its benchmark)
    def _sound(self, precision: str) -> dict[str, float]:
        """The error that a sound evaluation has in the mean: on one image plain PyTorch may be
        lucky."""
        images = self.images[: self.SOUND]
        exact = {name: value[: self.SOUND] for name, value in self.exact.items()}
        dtype, evaluate = DTYPES[precision], lambda: dict(self._evaluate(images))
        found = entitlement(evaluate, exact, dtype, self._reference)
        return {name: errors.l2 for name, errors in found.items()}

    def _own_truth(self, entrant: Entrant) -> Outputs | None:
        if entrant.name not in self._own:
            if entrant.exact(self.images[:1]) is None:
                return None
            self._own[entrant.name] = self.over(lambda images: entrant.exact(images) or {})
        return self._own[entrant.name]


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def tensors_of(returned: Any) -> list[Tensor]:
    """The tensors of an op that are the result, partial sums left out."""
    items = [returned] if isinstance(returned, Tensor) else list(returned)
    return [item for item in items if item is not None]


def refusal_of_op(case: Case, kernel: Callable[..., Any], inputs: tuple[list, dict]) -> str | None:
    """Why `kernel` gets no figure on these inputs, with the numbers; None where it is right.

    The error against float64 may be twice that of the oracle in the case's dtype, and the rounding
    of the result. A result in FP8 is held against the numbers before they were quantized, whose
    rounding the oracle's error has in it.
    """
    values, keywords = inputs
    oracle = getattr(oracles, op_of(case))
    writes_sums = op_of(case) in ("linear_residual", "patch_embed")
    with torch.no_grad():
        ours = tensors_of(kernel(*values, **keywords))
        plain = tensors_of(oracle(*values, **keywords))
        wide = {name: _widened(value) for name, value in keywords.items()}
        scale = wide.pop("out_scale", None)
        exact = tensors_of(oracle(*map(_widened, values), **wide))
        if scale is not None:
            limit = oracles.FP8_MAX
            exact = [(result / scale).clamp(-limit, limit) for result in exact]
    if writes_sums:
        ours, plain, exact = ours[:1], plain[:1], exact[:1]
    if not len(ours) == len(plain) == len(exact):
        return f"{len(ours)} results instead of {len(exact)}"
    for i, (found, near, right) in enumerate(zip(ours, plain, exact, strict=True)):
        rounded = 0.0 if scale is not None else torch.finfo(found.dtype).eps / 2 / math.sqrt(3)
        budget = 2 * relative_error(near, right) + rounded
        error = relative_error(found, right)
        if not error <= budget:  # nor is NaN
            return f"result {i}: error {error:.3e} exceeds its budget {budget:.3e}"
    return None
