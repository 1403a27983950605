"""The final norm, and rows quantized to FP8, beside what else computes it."""

OPS = ("norm", "quantize_rows")


def test_norm(race):
    race()
