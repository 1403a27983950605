"""Pixels to the sequence that enters the first block, beside what else computes it."""

import op_race
import pytest


@pytest.mark.parametrize(*op_race.parameters("patch_embed"))
def test_patch_embed(case, device, compiles, race):
    race(case, device, compiles)
