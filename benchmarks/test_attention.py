"""Attention, beside what else computes it."""

OPS = ("attention",)


def test_attention(race):
    race()
