"""Matrix products with their epilogues: qkv, proj, fc1, fc2, beside what else computes it."""

OPS = ("linear", "linear_residual")


def test_linear(race):
    race()
