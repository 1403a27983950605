"""Extraction of photographs of twelve megapixels, with and without `--scaled-decode`, in turns.

    python -P benchmarks/scaled_rate.py --images 2000

draws photographs, extracts them with a small model of random weights in both ways, and tells the
images a second of each and the cosine of the features between them. It writes a result file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import numpy as np
from extract_rate import BATCH, SMALL
from harness import results
from harness.timing import Timing
from peers.footprint import WEIGHTS

import stellar_fast
from stellar_fast import open_features, photos
from stellar_fast.extract import make_job, run
from stellar_fast.weights.manifest import write_config

SIZE = (4096, 3072)  # pixels
FEATURES = ("sparse", "cls")
WAYS = {"in full": False, "scaled": True}


def draw(index: int, folder: Path) -> int:
    """Writes one photograph: its bytes."""
    scene = list(photos.SCENES)[index % len(photos.SCENES)]
    path = folder / f"{index:04d}.jpg"
    photos.draw(scene, *SIZE, seed=index).save(path, quality=photos.JPEG_QUALITY)
    return path.stat().st_size


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of the rows of two arrays (N, K, D): (N,), of the mean over K."""
    one, other = (rows.mean(1, dtype=np.float64) for rows in (first, second))
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def measure(images: int, distinct: int, rounds: int, root: Path) -> Path:
    """
    Args:
        distinct: photographs that are drawn; each is listed under as many names as it takes.
        rounds: shares of the images, each extracted in both ways.
    """
    (root / "model").mkdir()
    (root / "drawn").mkdir()
    write_config(root / "model", SMALL, WEIGHTS)
    with ProcessPoolExecutor() as pool:
        size = sum(pool.map(draw, range(distinct), [root / "drawn"] * distinct))
    drawn = sorted((root / "drawn").iterdir())
    print(f"{distinct} photographs of {SIZE[0]}x{SIZE[1]}, {size / distinct / 2**20:.1f} MiB each")
    shares = []
    for number in range(rounds):
        shares.append(root / f"round-{number}")
        shares[-1].mkdir()
    for index in range(images):
        os.link(drawn[index % distinct], shares[index % rounds] / f"{index:06d}.jpg")

    engine = stellar_fast.load(
        SMALL.name, repo=root / "model", weights="synthetic", precision="fp32", device="cpu"
    )
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    found: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES}
    for number, share in enumerate(shares):
        outputs = {name: root / f"features-{number}-{name}" for name in WAYS}
        for name in sorted(WAYS, reverse=number % 2 == 1):
            told = {"batch_size": BATCH, "features": FEATURES, "scaled_decode": WAYS[name]}
            summary = run(make_job(share, outputs[name], **told), engine)
            assert summary.failed == 0, "every photograph is whole"
            rate = summary.rows / summary.seconds["total"]
            seconds[name].append(1 / rate)
            print(f"round {number}, {name}: {rate:.2f} images/s; {summary.stages}")
        opened = [open_features(outputs[name]) for name in WAYS]
        assert opened[0].ids == opened[1].ids
        for name in FEATURES:
            found[name].append(cosines(*(features[name][:] for features in opened)))
    timed = {name: Timing.of(taken) for name, taken in seconds.items()}
    row = {"stage": "scaled", "key": "scaled"}
    rows = [
        {**row, "name": name, **vars(timing), "images_per_second": 1 / timing.median}
        for name, timing in timed.items()
    ]
    cosine = {
        name: {"mean": float(np.concatenate(parts).mean()), "least": float(min(map(np.min, parts)))}
        for name, parts in found.items()
    }
    ratios = [a / b for a, b in zip(seconds["in full"], seconds["scaled"], strict=True)]
    header = results.facts(
        "scaled",
        "python -P benchmarks/scaled_rate.py",
        processor=results.processor(),
        load_average=os.getloadavg(),
        images=images,
        distinct=distinct,
        size=SIZE,
        mean_mib=size / distinct / 2**20,
        batch_size=BATCH,
        backbone=asdict(SMALL.backbone),
        weights="synthetic",
        faster={"median": statistics.median(ratios), "rounds": [round(r, 3) for r in ratios]},
        cosine=cosine,
    )
    print(f"scaled is {statistics.median(ratios):.2f} times as fast; cosine {cosine}")
    return results.write("cpu", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=200, help="photographs that are drawn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="for the images and features, if not temporary")
    arguments = parser.parse_args()
    counts = arguments.images, arguments.distinct, arguments.rounds
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        print(measure(*counts, Path(root)))


if __name__ == "__main__":
    main()
