"""Pixels to the sequence that enters the first block, beside what else computes it."""

OPS = ("patch_embed",)


def test_patch_embed(race):
    race()
