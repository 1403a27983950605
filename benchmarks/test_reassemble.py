"""The low-rank features alone, as `reconstruct` takes them, beside what else computes it."""

import op_race
import pytest


@pytest.mark.parametrize(*op_race.parameters("reassemble"))
def test_reassemble(case, device, compiles, race):
    race(case, device, compiles)
