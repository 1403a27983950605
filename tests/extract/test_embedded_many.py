"""Many images in Parquet: memory stays flat, and row groups are read once."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from parquets import cells, counting_work, jpeg
from pyarrow import parquet, table

from stellar_fast.extract import make_job, run

GROUP = 100  # rows, as the `datasets` library writes
FILES = 10
MIB = 1 << 20


def write_files(folder: Path, count: int) -> str:
    """Files whose row groups have 100 images of some 4 kB."""
    folder.mkdir()
    kinds = [jpeg(seed) for seed in range(50)]
    rng = np.random.default_rng(0)
    for shard in range(FILES):
        rows = range(shard * count // FILES, (shard + 1) * count // FILES)
        # Bytes behind the end of a JPEG belong to none: no two cells are equal.
        column = cells([kinds[row % len(kinds)] + rng.bytes(2000) for row in rows])
        path = folder / f"{shard:02d}.parquet"
        made = table({"image": column, "label": list(rows)})
        parquet.write_table(made, path, row_group_size=GROUP)
    return f"{folder}/*.parquet"


class Memory:
    """Private memory of this process and of those that it started, a few times a second."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int]] = []  # own, of the largest other one
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._done.wait(0.3):
            others = []
            for child in own.children(recursive=True):
                try:
                    others.append(child.memory_full_info().uss)
                except psutil.Error:
                    continue
            self.samples.append((own.memory_full_info().uss, max(others, default=0)))


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(3_000, marks=pytest.mark.slow),
        pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_memory_is_flat_and_groups_are_read_once(tmp_path, monkeypatch, engine, count, capsys):
    source = write_files(tmp_path / "set", count)
    monkeypatch.setattr("stellar_fast.extract.work.workers.work", counting_work)
    job = make_job(source, tmp_path / "out", keep=["label"], features=["cls"], workers=2)
    begun = time.perf_counter()
    with Memory() as memory:
        summary = run(job, engine)
    seconds = time.perf_counter() - begun
    assert (summary.images, summary.failed) == (count, 0)
    reads: Counter[tuple[str, str]] = Counter()
    for path in (tmp_path / "set").glob("*.begun"):
        reads.update((path.name, line) for line in path.read_text().split())
    # Of the last third over the middle one: at first, processes and libraries start.
    third = len(memory.samples) // 3
    middle, last = (
        np.array(memory.samples[third * part : third * (part + 1)]).mean(axis=0) for part in (1, 2)
    )
    grown = last - middle
    with capsys.disabled():
        print(
            f"\n{count} images in {seconds:.0f} s; {len(reads)} row groups begun "
            f"{sum(reads.values())} times; memory {middle[0] / MIB:.0f} MiB, and of a decoding "
            f"process {middle[1] / MIB:.0f}; grown by {grown[0] / MIB:.1f} and {grown[1] / MIB:.1f}"
        )
    assert len(reads) == count // GROUP
    # A group that a partition ends in may be begun by two processes; all others once.
    assert sum(reads.values()) <= len(reads) + count // 4096 + 1
    assert max(reads.values()) <= 2
    assert grown.max() < 32 * MIB
