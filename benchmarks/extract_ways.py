"""Extraction of photographs by the default engine and by int8, against float32 on PyTorch alone.

    python -P benchmarks/extract_ways.py --images 64

draws photographs, cuts JPEGs from them and extracts sparse tokens and CLS with stellar-b16 of
random weights, each way in a process of its own, in turns; first alone, then beside four processes
that are always busy. It writes a result file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import torch
from extract_rate import BATCH, write_photographs
from harness import results, workloads
from harness.timing import Timing

import stellar_fast
from stellar_fast.extract import make_job, run

MODEL = "stellar-b16"
FEATURES = ("sparse", "cls")
BUSY = 4  # processes
CALIBRATION = 32  # images
PLAIN = "fp32 on PyTorch"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"precision": "fp32", "backend": "torch"},
    "default": {},
    "int8": {"precision": "int8"},
}


def extract(way: str, source: Path, output: Path) -> dict[str, Any]:
    """What one extraction took, in this process; making the engine is not in it."""
    engine = stellar_fast.load(MODEL, weights="synthetic", device="cpu", **WAYS[way])
    if not engine.calibrated:
        engine.calibrate(workloads.pictures(CALIBRATION, 224, seed=7))
    engine.encode(torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8), outputs=FEATURES)
    summary = run(make_job(source, output, batch_size=BATCH, features=FEATURES), engine)
    assert summary.failed == 0, "every photograph is whole"
    seconds = summary.seconds["total"] / summary.rows
    return {"seconds": seconds, "precision": engine.precision, "backend": engine.backend}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside as many processes that compute all the time."""
    spin = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(images: int, rounds: int, root: Path) -> Path:
    write_photographs(root / "photographs", images)
    rows, ratios = [], {}
    for beside in (0, BUSY):
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        with busy(beside):
            for number in range(rounds):
                for way in sorted(WAYS, reverse=number % 2 == 1):
                    output = root / f"{beside}-{number}-{way}"
                    paths = ["--source", root / "photographs", "--output", output]
                    done = subprocess.run(
                        [sys.executable, "-P", __file__, "--way", way, *map(str, paths)],
                        stdout=subprocess.PIPE,
                        check=True,
                    )
                    found[way].append(json.loads(done.stdout.splitlines()[-1]))
                    rate = 1 / found[way][-1]["seconds"]
                    print(
                        f"beside {beside}, round {number}, {way}: {rate:.2f} images/s", flush=True
                    )
        for way, taken in found.items():
            timing = Timing.of([one["seconds"] for one in taken])
            row = {"stage": "extract ways", "key": f"{MODEL}/beside {beside}", "name": way}
            row |= {"precision": taken[0]["precision"], "backend": taken[0]["backend"]}
            rows.append({**row, **vars(timing), "images_per_second": 1 / timing.median})
            turns = zip(found[PLAIN], taken, strict=True)
            faster = [plain["seconds"] / one["seconds"] for plain, one in turns]
            ratios[f"{way}, beside {beside}"] = round(statistics.median(faster), 3)
    print(f"faster than {PLAIN}: {ratios}")
    header = results.facts(
        "extract-ways",
        "python -P benchmarks/extract_ways.py",
        processor=results.processor(),
        load_average=os.getloadavg(),
        images=images,
        batch_size=BATCH,
        features=FEATURES,
        weights="synthetic",
        busy_processes=BUSY,
        faster=ratios,
    )
    return results.write("cpu", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("--way", "--source", "--output"):  # of one extraction in this process
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(extract(given.way, Path(given.source), Path(given.output))))
        return
    with tempfile.TemporaryDirectory() as root:
        print(measure(given.images, given.rounds, Path(root)))


if __name__ == "__main__":
    main()
