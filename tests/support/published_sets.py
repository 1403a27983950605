"""Image sets with labels, written by the libraries that people write them with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pictures import saved
from PIL import Image

CAPTION = "a picture of class {}, number {}"


def pictures(count: int, classes: int = 3, seed: int = 0) -> tuple[list[Image.Image], list[int]]:
    """Pictures in which a class is a colour that noise half hides, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).tolist()
    tint = rng.integers(0, 256, (classes, 3))
    found = []
    for label in labels:
        coarse = rng.integers(0, 256, (6, 6, 3))
        mixed = (0.8 * coarse + 0.2 * tint[label]).astype(np.uint8)
        found.append(Image.fromarray(mixed).resize((64, 48), Image.Resampling.BICUBIC))
    return found, labels


def write_datasets(folder: Path, images: list[Image.Image], labels: list[int]) -> str:
    """Two Parquet files by the `datasets` library: what INPUT names."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["red", "green", "blue"]),
            "caption": datasets.Value("string"),
        }
    )
    captions = [CAPTION.format(label, at) for at, label in enumerate(labels)]
    rows = {"image": images, "label": labels, "caption": captions}
    whole = datasets.Dataset.from_dict(rows, features)
    folder.mkdir()
    for shard in range(2):
        part = whole.shard(2, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05d}-of-00002.parquet", batch_size=7)
    return f"{folder}/train-*.parquet"


def write_webdataset(folder: Path, images: list[Image.Image], labels: list[int]) -> str:
    """Tars by the `webdataset` package: what INPUT names."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/train-%04d.tar", maxcount=17, verbose=0) as writer:
        for at, (image, label) in enumerate(zip(images, labels, strict=True)):
            caption = CAPTION.format(label, at)
            sample = {"__key__": f"{at:06d}", "jpg": saved(image, "JPEG"), "cls": label}
            writer.write(sample | {"json": {"caption": caption, "number": at}})
    return f"{folder}/train-*.tar"
