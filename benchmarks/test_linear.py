"""The matrix products (qkv, proj, fc1, fc2), each with what its launch fuses, beside rivals."""

import op_race
import pytest


@pytest.mark.parametrize(*op_race.parameters("linear", "linear_residual"))
def test_linear(case, device, compiles, race):
    race(case, device, compiles)
