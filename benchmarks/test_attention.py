"""Attention, beside what else computes it."""

import op_race
import pytest


@pytest.mark.parametrize(*op_race.parameters("attention"))
def test_attention(case, device, compiles, race):
    race(case, device, compiles)
