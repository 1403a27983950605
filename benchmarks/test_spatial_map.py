"""The spatial maps with the low-rank features, beside what else computes it."""

OPS = ("spatial_map",)


def test_spatial_map(race):
    race()
