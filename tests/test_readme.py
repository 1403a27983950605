"""The Python of every README runs as it stands, on small models with random weights.

A README's blocks run one after another, in a folder that has what they name: images, features, and
in place of the published repository a local one, whose models are small.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint, write_vqgan
from engines import SMALL
from torch.utils.data import DataLoader

import stellar_fast
from stellar_fast import loading, photos
from stellar_fast.extract import make_job, run
from stellar_fast.recipes import heads
from stellar_fast.weights import source

ROOT = Path(__file__).parent.parent
READMES = {
    path.relative_to(ROOT).as_posix(): re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    for path in [*sorted(ROOT.glob("*/**/README.md")), ROOT / "README.md"]
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
}
WITH_PYTHON = {name: blocks for name, blocks in READMES.items() if blocks}
PUBLISHED = source.PUBLISHED_REPO
ON_GPU = torch.cuda.is_available()


def test_there_are_blocks():
    assert len(READMES["README.md"]) == 2 and len(WITH_PYTHON) >= 3
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the blocks find where they run."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("stellar-b16", "stellar-h16"):
        write_checkpoint(
            place / "published", name, backbone=SMALL, num_sparse_tokens=8, num_decoder_layers=1
        )
    write_vqgan(place / "vq.safetensors", seed=7)
    for index, scene in enumerate(photos.SCENES):
        (place / "photographs" / scene).mkdir(parents=True)
        for seed in range(4):
            picture = photos.draw(scene, 64, 48, seed + 10 * index)
            picture.save(place / "photographs" / scene / f"{seed}.jpg")
    for name in ("a.jpg", "b.png", "query.jpg"):
        photos.draw("sea", 64, 48, 1).save(place / name)
    engine = stellar_fast.load("stellar-b16", repo=place / "published", device="cpu")
    job = make_job(
        place / "photographs",
        place / "features",
        features=("sparse", "cls", "spatial", "dense"),
        workers=1,
    )
    run(job, engine)
    return place


def load(name: str, **arguments) -> stellar_fast.Engine:
    if not ON_GPU and "fp8" in str(arguments):  # no CPU has it: in the interpreter of Triton
        arguments |= {"backend": "triton", "device": "cpu"}
    return loading.load(name, **arguments)


@pytest.mark.parametrize("readme", WITH_PYTHON)
def test_the_python_of_a_readme_runs(readme, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))  # of the key of search indexes
    monkeypatch.setattr(stellar_fast, "load", load, raising=False)
    locate = source.locate

    def here(name: str, *, repo, **arguments):
        return locate(name, repo=place / "published" if repo == PUBLISHED else repo, **arguments)

    monkeypatch.setattr(source, "locate", here)
    for probe in (heads.classification_probe, heads.segmentation_probe):
        monkeypatch.setitem(probe.__kwdefaults__, "epochs", 2)
    image = torch.rand(1, 3, 224, 224)
    rows = np.arange(4 * len(photos.SCENES))
    names = {
        "stellar_fast": stellar_fast, "torch": torch, "DataLoader": DataLoader,
        "PATH": place / "vq.safetensors", "batch": image, "image": image,
        "images": torch.rand(2, 3, 32, 32), "others": torch.rand(2, 3, 32, 32),
        "labels": torch.arange(1),
        "global_views": torch.rand(1, 8, 3, 224, 224), "local_views": torch.rand(1, 8, 3, 96, 96),
        "masks": np.random.default_rng(0).integers(0, 3, (len(rows), 224, 224)),
        "dense_test": np.zeros((2, 196, 64), np.float32),
        "masks_test": np.zeros((2, 224, 224), int),
        "train": rows % 2 == 0, "test": rows % 2 == 1,
        "labels_train": rows[::2] // 4, "labels_test": rows[1::2] // 4,
    }  # fmt: skip
    engine = stellar_fast.load("stellar-b16")
    for block in WITH_PYTHON[readme]:
        names["engine"] = engine  # where a block makes none: the one of the features
        exec(block, names)
    if "out" in names and readme == "README.md":
        assert list(names["out"]) == ["sparse", "spatial", "dense", "lowrank", "cls"]
