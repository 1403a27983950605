"""The final norm, and rows quantized to FP8, beside what else computes it."""

import op_race
import pytest


@pytest.mark.parametrize(*op_race.parameters("norm", "quantize_rows"))
def test_norm(case, device, compiles, race):
    race(case, device, compiles)
