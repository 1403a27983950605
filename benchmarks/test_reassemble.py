"""The low-rank features alone, as `reconstruct` takes them, beside what else computes it."""

OPS = ("reassemble",)


def test_reassemble(race):
    race()
