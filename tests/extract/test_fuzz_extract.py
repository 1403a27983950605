"""Damaged files through a whole extraction: each is a row of features, or a line with a reason."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from engines import small_engine
from mutants import FORMATS, mutant

import stellar_fast
from stellar_fast import images
from stellar_fast.errors import ImageError
from stellar_fast.extract import make_job, run

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}


def write_mutants(folder: Path, each: int, first: int) -> list[str]:
    """`each` mutants of every format in a folder of its own: their paths in `folder`."""
    names = []
    for format in FORMATS:
        (folder / format).mkdir(parents=True)
        for seed in range(first, first + each):
            names.append(f"{format}/{seed}.{SUFFIXES[format]}")
            (folder / names[-1]).write_bytes(mutant(format, seed))
    return sorted(names)


def check(tmp_path: Path, each: int, first: int, sampled: int) -> None:
    names = write_mutants(tmp_path / "in", each, first)
    engine = small_engine()
    output = tmp_path / "out"
    summary = run(make_job(tmp_path / "in", output, partition_size=64, batch_size=16), engine)
    assert summary.images == len(names)
    features = stellar_fast.open_features(output)
    features.verify()
    index = features.index.to_pydict()
    assert index["id"] == names, "an image was lost, doubled or shifted"
    assert index["status"].count("ok") == len(features) == summary.rows > 0
    assert summary.failed > 0
    for status, reason in zip(index["status"], index["reason"], strict=True):
        assert (reason is None) == (status == "ok")
        assert status == "ok" or (reason and "\n" not in reason and "died" not in reason)
    for feature in ("sparse", "cls"):
        assert np.isfinite(features[feature].to_numpy()).all()

    rng = np.random.default_rng(first)
    for at in rng.choice(len(names), sampled, replace=False):
        path = tmp_path / "in" / names[at]
        check_one(path, index["row"][at], index["reason"][at], features, engine)


def check_one(path: Path, row: int | None, reason: str | None, features, engine) -> None:
    """The line of the index is what `images` says, and the row is that image's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = images.load_image(path.read_bytes(), "card")
        except ImageError as error:
            assert reason == error.reason
            return
    cls = engine.encode(pixels[None], outputs=("cls",))["cls"][0].numpy()
    np.testing.assert_allclose(features["cls"][row], cls, rtol=1e-4, atol=1e-4)


def test_mutants_through_an_extraction(tmp_path):
    check(tmp_path, each=12, first=500_000, sampled=20)


@pytest.mark.slow
def test_hundreds_of_mutants_through_an_extraction(tmp_path):
    check(tmp_path, each=200, first=600_000, sampled=100)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_mutants_through_an_extraction(tmp_path):
    check(tmp_path, each=1700, first=50_000_000, sampled=500)
