"""Output folders of extraction, written by its own partitions, of features made up here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stellar_fast.extract.output.folder import Locks
from stellar_fast.extract.output.layout import Partition, Plan, digest_of, write_plan
from stellar_fast.extract.output.partition import Work
from stellar_fast.extract.records import Item
from stellar_fast.extract.work.decoding import Outcome

SHAPES = {"sparse": (4, 6), "cls": (1, 6)}
ROWS = 23
FAILED = (0, 3, 10, 11, 12, 13, 14, 24)  # partition 2 of 5 images has no row at all


def write_output(
    folder: Path,
    features: Mapping[str, np.ndarray],
    *,
    size: int = 5,
    failed: Sequence[int] = (),
    leave_out: Sequence[int] = (),
    format: str = "npy",
    batch: int = 2,
    weights: str = "made-up",
) -> list[str]:
    """Writes `features` (rows, ...) into partitions of `size` images: the ids of all images.

    Args:
        failed: places, among all images, of those that have no row.
        leave_out: partitions that are not written.
        batch: rows that are appended at once.
    """
    rows = len(next(iter(features.values())))
    dtype = next(iter(features.values())).dtype.name
    ids = [f"folder/{place:04d}.jpg" for place in range(rows + len(failed))]
    items = [Item(id, f"/nowhere/{id}") for id in ids]
    configuration = {
        "model": {"name": "made-up", "backbone": {"patch_size": 16}},
        "weights": weights,
        "precision": "fp32",
        "input": "/nowhere",
        "column": None,
        "id_column": None,
        "keep": {},
        "preset": "card",
        "scaled_decode": False,
        "features": list(features),
        "dtype": dtype,
        "format": format,
        "batch_size": batch,
        "partition_size": size,
    }
    starts = range(0, len(ids), size)
    parts = [ids[start : start + size] for start in starts]
    plan = Plan(
        configuration,
        tuple(
            Partition(at, len(part), digest_of(items[start : start + size]))
            for at, (start, part) in enumerate(zip(starts, parts, strict=True))
        ),
        {},
    )
    folder.mkdir()
    write_plan(folder, plan, items)
    shapes = {name: array.shape[1:] for name, array in features.items()}
    row = 0
    with Locks(folder) as locks:
        for at, part in enumerate(parts):
            places = range(at * size, at * size + len(part))
            good = [place for place in places if place not in failed]
            if at not in leave_out:
                _write_partition(
                    Work(folder, plan, at, [items[place] for place in places], shapes, locks),
                    [place in failed for place in places],
                    [ids[place] for place in good],
                    {name: array[row : row + len(good)] for name, array in features.items()},
                    batch,
                )
            row += len(good)
    return ids


def _write_partition(
    work: Work,
    failed: list[bool],
    ids: list[str],
    rows: Mapping[str, np.ndarray],
    batch: int,
) -> None:
    for number, bad in enumerate(failed):
        work.add(_outcome(number, bad))
    for start in range(0, len(ids), batch):
        end = start + batch
        work.append(ids[start:end], {name: array[start:end] for name, array in rows.items()})
    work.finish({})


def _outcome(number: int, bad: bool) -> Outcome:
    if bad:
        return Outcome(number, 0, "was made to fail")
    return Outcome(number, 0, width=640, height=480)


def made_up(rows: int, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Features of `rows` images, all different."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((rows, *shape)).astype(dtype) for name, shape in SHAPES.items()
    }
