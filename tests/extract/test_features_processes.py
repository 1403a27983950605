"""Extracted features in threads and processes: pickles, forks, and torch's DataLoader."""

import os
import pickle
import signal
import warnings
from itertools import product

import numpy as np
import pytest
from outputs import FAILED, ROWS, made_up, write_output
from threads import in_threads
from torch.utils.data import DataLoader, Dataset

import stellar_fast
from stellar_fast.extract.features import Features
from stellar_fast.extract.output.formats import FORMATS


def test_a_pickle_holds_no_rows(output):
    folder, expected, _ = output
    features = stellar_fast.open_features(folder)
    before = len(pickle.dumps(features))
    _ = features["sparse"][:], features.ids, features.failed
    again = pickle.loads(pickle.dumps(features))
    assert isinstance(again, Features)
    assert len(pickle.dumps(features)) == before < 20_000
    np.testing.assert_array_equal(again["sparse"][4:9], expected["sparse"][4:9])
    assert again.ids == features.ids


def test_many_threads(output):
    folder, expected, _ = output
    features = stellar_fast.open_features(folder)
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            name = rng.choice(["sparse", "cls"])
            rows = rng.integers(0, ROWS, 4)
            if not np.array_equal(features[name][rows], expected[name][rows]):
                wrong.append(rows)

    in_threads(work, range(6))
    assert wrong == []


def test_a_child_forked_while_a_thread_reads(output):
    """It must not wait for a lock that nobody in it will release."""
    folder, expected, _ = output
    features = stellar_fast.open_features(folder)
    _ = features["cls"][:]
    with features._rows.opened._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forking threads
        child = os.fork()
        if not child:
            signal.alarm(120)
            same = np.array_equal(features["cls"][:], expected["cls"])
            os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_dataset(output):
    folder, expected, _ = output
    features = stellar_fast.open_features(folder)
    data = features.dataset()
    assert isinstance(data, Dataset)
    assert len(data) == ROWS
    assert sorted(data[3]) == ["cls", "sparse"]
    np.testing.assert_array_equal(data[-1]["sparse"].numpy(), expected["sparse"][-1])
    data[2]["sparse"].zero_()  # a copy
    np.testing.assert_array_equal(data[2]["sparse"].numpy(), expected["sparse"][2])
    with pytest.raises(IndexError):
        data[ROWS]
    named = features.dataset(["cls"], with_ids=True)[5]
    assert sorted(named) == ["cls", "id"]
    assert named["id"] == features.ids[5]


@pytest.mark.parametrize(("format", "context"), [*product(FORMATS, ["fork"]), ("npy", "spawn")])
def test_loader_workers_see_every_row_once(format, context, tmp_path):
    folder, expected = tmp_path / "out", made_up(ROWS)
    write_output(folder, expected, failed=FAILED, format=format)
    features = stellar_fast.open_features(folder)
    _ = features["sparse"][:]  # files are open here: the workers open their own
    loader = DataLoader(
        features.dataset(with_ids=True),
        batch_size=4,
        shuffle=True,
        num_workers=2 if context == "fork" else 1,  # a spawned one imports torch
        multiprocessing_context=context,
    )
    found = {}
    for batch in loader:
        assert batch["sparse"].shape[1:] == (4, 6)
        found |= dict(zip(batch["id"], batch["sparse"].numpy(), strict=True))
    assert sorted(found) == features.ids
    np.testing.assert_array_equal(np.stack([found[id] for id in features.ids]), expected["sparse"])
