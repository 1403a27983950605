"""Extraction on a GPU: images go up and features come down beside the engine's work."""

import numpy as np
import pytest
import torch
from engines import small_engine
from extracting import feature, index
from scenes import write_photographs

from stellar_fast.extract import make_job, run
from stellar_fast.images.presets import load_image

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", ["card", "eval"])
def test_rows_are_the_engines_features_in_the_same_batches(tmp_path, preset):
    engine = small_engine(device="cuda")
    write_photographs(tmp_path / "photographs", good=60, broken=6)
    job = make_job(
        tmp_path / "photographs", tmp_path / "out", preset=preset, partition_size=33, batch_size=4
    )
    run(job, engine)
    table = index(tmp_path / "out")
    for start, stop in ((0, 33), (33, 66)):
        good = [item for item, row in zip(job.items, table["row"], strict=True) if row is not None]
        good = [item for item in good if item in job.items[start:stop]]
        pixels = torch.stack([load_image(item.file, preset) for item in good])
        parts = [engine.encode(part.cuda(), check_range=False) for part in pixels.split(4)]
        expected = torch.cat([part["sparse"] for part in parts]).cpu().numpy()
        rows = [row for row in table["row"][:start] if row is not None]
        found = feature(tmp_path / "out", "sparse")[len(rows) : len(rows) + len(good)]
        np.testing.assert_array_equal(found, expected)
