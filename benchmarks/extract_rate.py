"""Extraction of many real-sized JPEGs: stage timings, memory, and how busy the engine is kept.

    python -P benchmarks/extract_rate.py --images 20000

draws photographs, cuts and encodes as many JPEGs from them as asked for, and extracts their
features with a small model of random weights. Beside it, in turns, it times the engine on ready
tensors and the pipeline with a dummy reader and writer. It writes a result file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

import numpy as np
import psutil
import torch
from harness import results
from peers.footprint import WEIGHTS
from PIL import Image

import stellar_fast
from stellar_fast import photos
from stellar_fast.config import BackboneConfig, ModelConfig
from stellar_fast.extract import make_job, run
from stellar_fast.extract.job import decided, make_plan
from stellar_fast.extract.runner import work
from stellar_fast.weights.manifest import write_config

# On a core it encodes an image in about the time that decoding a photograph takes.
SMALL = ModelConfig("small", BackboneConfig(128, 6, 2, 512, 16, 224), num_sparse_tokens=16)
FULL = (2000, 1500)  # pixels of a drawn photograph
SIDES = (320, 1024)  # of a cut
BATCH = 16


def cut(scene: int, folder: Path, count: int) -> int:
    """Writes `count` JPEGs cut from one drawn photograph: their bytes."""
    full = photos.draw(list(photos.SCENES)[scene], *FULL, seed=scene)
    rng = np.random.default_rng(scene)
    total = 0
    for index in range(count):
        width, height = (int(side) for side in rng.integers(*SIDES, 2))
        left = int(rng.integers(0, FULL[0] - width + 1))
        top = int(rng.integers(0, FULL[1] - height + 1))
        part = full.crop((left, top, left + width, top + height))
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / f"{scene}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=int(rng.integers(75, 96)))
        total += path.stat().st_size
    return total


def write_photographs(folder: Path, count: int) -> int:
    scenes = len(photos.SCENES)
    shares = [count // scenes + (scene < count % scenes) for scene in range(scenes)]
    with ProcessPoolExecutor() as pool:
        return sum(pool.map(cut, range(scenes), [folder] * scenes, shares))


class Memory:
    """Resident bytes of this process and its children, about every second."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._done.wait(1):
            total = own.memory_info().rss
            for child in own.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.samples.append(total)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def quarter(self, number: int) -> int:
        """The median of one quarter of the time, in MiB."""
        size = max(1, len(self.samples) // 4)
        part = self.samples[number * size : (number + 1) * size] or self.samples[-1:]
        return round(statistics.median(part) / 2**20)


def ready_rate(engine: stellar_fast.Engine, images: int) -> float:
    """Images a second of the engine alone, on batches in memory."""
    batch = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    engine.encode(batch, outputs=("sparse", "cls"))
    start = time.perf_counter()
    for _ in range(images // BATCH):
        engine.encode(batch, outputs=("sparse", "cls"))
    return images // BATCH * BATCH / (time.perf_counter() - start)


def dummy_rate(engine: stellar_fast.Engine, source: Path) -> float:
    """Images a second of the pipeline with nothing to read or write, from its second batch on."""
    job = make_job(source, "nowhere", batch_size=BATCH, dummy_reader=True, dummy_writer=True)
    times: list[float] = []
    images: list[int] = []

    def tell(kind: str, *content: Any) -> None:
        if kind == "report" and content[0]:
            times.append(time.perf_counter())
            images.append(content[0])

    work(job, make_plan(job, decided(job, engine)), engine, {0: None}, tell)
    return sum(images[1:]) / (times[-1] - times[0])


def measure(images: int, rounds: int, round_images: int, root: Path) -> Path:
    (root / "model").mkdir()
    write_config(root / "model", SMALL, WEIGHTS)
    start = time.perf_counter()
    size = write_photographs(root / "photographs", images)
    print(f"{images} JPEGs, {size / 2**20:.0f} MiB, in {time.perf_counter() - start:.0f} s")
    paths = sorted((root / "photographs").rglob("*.jpg"))[:round_images]
    (root / "round.txt").write_text("".join(f"{path}\n" for path in paths))

    engine = stellar_fast.load(
        "small", repo=root / "model", weights="synthetic", precision="fp32", device="cpu"
    )
    with Memory() as memory:
        job = make_job(root / "photographs", root / "features", batch_size=BATCH)
        summary = run(job, engine)
    print(f"{summary}\n{summary.stages}")
    assert summary.rows == images, "every JPEG is whole"

    ready, dummy = [], []
    for _ in range(rounds):
        ready.append(ready_rate(engine, round_images))
        dummy.append(dummy_rate(engine, root / "round.txt"))
        print(f"ready {ready[-1]:.1f} images/s, dummy reader and writer {dummy[-1]:.1f} images/s")
    ratios = [fed / alone for fed, alone in zip(dummy, ready, strict=True)]
    row = {"stage": "extract", "key": "extract"}
    rows = [
        {**row, "name": "extraction", **summary.facts()},
        {**row, "name": "engine on ready tensors", "images_per_second": statistics.median(ready)},
        {**row, "name": "dummy reader and writer", "images_per_second": statistics.median(dummy)},
    ]
    header = results.facts(
        "extract",
        "python -P benchmarks/extract_rate.py",
        processor=results.processor(),
        load_average=os.getloadavg(),
        images=images,
        input_mib=round(size / 2**20),
        batch_size=BATCH,
        backbone=asdict(SMALL.backbone),
        fed={"median": statistics.median(ratios), "rounds": [round(r, 4) for r in ratios]},
        memory_mib={f"quarter {number + 1}": memory.quarter(number) for number in range(4)},
    )
    return results.write("cpu", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9, help="of the engine against the pipeline")
    parser.add_argument("--round-images", type=int, default=960)
    parser.add_argument("--folder", type=Path, help="for the images and features, if not temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        counts = arguments.images, arguments.rounds, arguments.round_images
        print(measure(*counts, Path(root)))


if __name__ == "__main__":
    main()
