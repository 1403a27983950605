"""Forged output folders by the thousand: each is an error of one line, or is read as it is."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forged import Forger, outcome, read_all
from memory import peak
from outputs import made_up, write_output

FAILED = (1, 6, 7)
ALLOWED = tuple(str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, *sys.path))
_watched: list[Path] = []  # the folder that is read now
_strayed: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """Notes what is opened that is no file of the folder being read."""
    if event != "open" or not _watched or not isinstance(arguments[0], str | bytes):
        return
    name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
    inside = Path(name).is_relative_to(_watched[0]) or "/" not in name
    if not inside and not name.startswith(ALLOWED):
        _strayed.append(name)


def fuzz(tmp_path: Path, count: int, seed: int) -> dict[str, int]:
    """Reads `count` forgeries: how many of each kind were read."""
    sys.addaudithook(watch)
    counts = {}
    before = peak()
    for format in ("npy", "parquet"):
        original = tmp_path / f"{format}-original"
        write_output(original, made_up(10), failed=FAILED, format=format)
        expected = read_all(original)
        forger = Forger(original, tmp_path / format, seed)
        names = ["plan.json", "part-00001/manifest.json", "part-00001/index.parquet"]
        names.append("part-00001/" + ("sparse.npy" if format == "npy" else "features.parquet"))
        for name in names:
            read = 0
            for _ in range(count // 8):
                forger.forge(name)
                _watched[:] = [forger.folder]
                start = time.process_time()
                found = outcome(forger.folder)
                spent = time.process_time() - start
                _watched.clear()
                assert spent < 10
                if isinstance(found, dict):
                    read += 1
                    if not name.endswith(".parquet"):  # the features are those of before
                        for what, rows in expected.items():
                            np.testing.assert_array_equal(found[what], rows)
                forger.undo()
            counts[f"{format} {name}"] = read
    assert _strayed == []
    assert peak() - before < 512 << 20
    return counts


def test_forgeries_are_refused_or_read_rightly(tmp_path):
    counts = fuzz(tmp_path, count=400, seed=1)
    assert all(read < 50 for read in counts.values()), counts
    assert sum(counts.values()) > 0, "nothing was ever read: the forgeries are too coarse"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_forgeries(tmp_path):
    print(fuzz(tmp_path, count=10_000, seed=2))
