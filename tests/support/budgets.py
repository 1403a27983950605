"""Every tolerance of the numerical tests, and where it comes from; tests/README.md has the table.

None of them is what one machine gave. They come from the agreement that the golden files ask for,
from the rounding of what is stored, or from float64: `entitlement` computes what rounding costs any
sound evaluation of a function, without asking how this processor rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from checkpoints import relative_error
from harness.rounding import Errors, entitlement, peak_error, rounding, rounding_as
from torch import Tensor

__all__ = ["Errors", "entitlement", "peak_error", "rounding", "rounding_as"]

# What tests/golden asks of a float32 implementation. Two float32 evaluations of one formula, of any
# batch, layout or order of summation, are held to the same.
TENSOR = 2e-5  # relative L2 of features, decoder outputs, logits and pixels
SPATIAL = 1e-4  # relative L2 of `spatial - 1 / K`
LOSS = 1e-4  # relative
GRADIENT = 1e-3  # relative, of gradients and of their norms
TEACHER = 1e-6  # relative L2 of an averaged tensor: two products and a sum in float32
PRESET = 5e-5  # absolute, of a pixel of the evaluation transform
PRESET_ROW = 5e-4  # absolute, of the sum of a row of 224 such pixels
PROBE = 5e-6  # relative L2 of a probe's logits: a LayerNorm eps of 1e-12 shows
TIE = 1e-3  # tokens may differ where the two best logits are no further apart

# Two float64 evaluations of one formula: thousands of roundings of 1.1e-16.
FLOAT64 = 1e-12


def assert_stored_as(found: Tensor, stored: Tensor) -> None:
    """Whether `found` is within `TENSOR` of the numbers that were rounded to `stored`.

    Two things follow if it is, whatever those numbers were. What of `found` lies outside the
    numbers that round to `stored` is within `TENSOR` too: an outlier shows. And the differences are
    as small as rounding makes them: their squares sum to a twelfth of the squares of the steps,
    give or take what so many uniform errors do (four of their standard deviations), and the square
    of `TENSOR`. A step of the storage is much larger than `TENSOR`, but there are many numbers.
    """
    kept, exact = stored.double(), found.detach().double().cpu()
    assert exact.shape == kept.shape and exact.isfinite().all()
    step = torch.nextafter(stored.abs(), torch.full_like(stored, math.inf)).double() - kept.abs()
    allowed = TENSOR**2 * kept.square().sum()
    beyond = ((exact - kept).abs() - step / 2).clamp_min(0).square().sum()
    assert beyond <= allowed, f"{(beyond / allowed).sqrt() * TENSOR:.3g} beyond the stored numbers"
    rounded = (stored != 0) & (stored != 1)  # these may have been cut off
    squares, steps = (exact - kept)[rounded].square().sum(), step[rounded].square()
    chance = 4 * (steps.square().sum() / 180).sqrt()  # variance of the square of a uniform number
    excess = squares - steps.sum() / 12
    assert excess <= allowed + chance, f"{(excess / allowed).sqrt() * TENSOR:.3g} and the rounding"


def assert_same_features(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two float32 evaluations of one formula, each within the goldens' tolerance: as `encode` or
    `reconstruct` gives them, of which tokens may differ at ties, and then all pixels of the image.
    """
    assert found.keys() == expected.keys()
    decided = torch.ones(len(next(iter(expected.values()))), dtype=torch.bool)
    if "tokens" in expected:
        logits = expected["logits"]
        best = logits.topk(2, dim=-1).values
        ties = best[..., 0] - best[..., 1] < 2 * TENSOR * logits.abs().amax()
        assert torch.equal(found["tokens"][~ties], expected["tokens"][~ties])
        decided = ~ties.any(1)
        assert decided.any()
    for name in expected.keys() - {"tokens"}:
        one, other, bound = found[name], expected[name], TENSOR
        if name == "reconstruction":
            one, other = one[decided], other[decided]
        if name in ("spatial", "peak_dist"):
            mean, bound = 1 / other.shape[-1], SPATIAL
            one, other = one.double() - mean, other.double() - mean
        error = relative_error(one, other)
        assert error < bound, f"{name}: {error:.3g}"


def assert_within_budget(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    entitled: Errors | None = None,
    name: str = "",
) -> None:
    """Error against float64 at most twice plain PyTorch's, plus the rounding of the result.

    Plain PyTorch's error is one draw of what rounding does to a formula, and may be a lucky one: a
    few numbers, such as the tokens that all of a spatial map depends on, can decide it. With
    `entitled`, the error that a sound evaluation has in the mean counts if it is larger, and no
    single number may be further off than twice what it is there.
    """
    error, of_plain = relative_error(ours, exact), relative_error(plain, exact)
    sound = Errors() if entitled is None else entitled
    budget = 2 * max(of_plain, sound.l2) + rounding(dtype)
    assert error <= budget, (
        f"{name} relative error {error:.3g}, budget {budget:.3g}: plain PyTorch's {of_plain:.3g}, "
        f"entitled {sound.l2:.3g}"
    )
    if entitled is not None:
        largest, of_plain = peak_error(ours, exact), peak_error(plain, exact)
        budget = 2 * max(of_plain, sound.peak) + torch.finfo(dtype).eps / 2 * peak_error(
            exact, 0 * exact
        )
        assert largest <= budget, f"{name} off by {largest:.3g} somewhere, budget {budget:.3g}"
