"""The spatial maps with the low-rank features, beside what else computes it."""

import op_race
import pytest


@pytest.mark.parametrize(*op_race.parameters("spatial_map"))
def test_spatial_map(case, device, compiles, race):
    race(case, device, compiles)
