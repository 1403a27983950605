"""What is known when something is opened or loaded stays so, wherever the process goes; and rows
and labels are the ones that were meant."""

import os
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from outputs import made_up, write_output
from tiny import BACKBONE

import stellar_fast
from stellar_fast.extract import identify
from stellar_fast.extract.output.layout import sha256_of
from stellar_fast.recipes import probe


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A folder to go to, and back from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away").mkdir()
    return tmp_path / "away"


# Outputs


def test_an_output_opened_by_a_relative_path(away):
    expected, other = made_up(7), made_up(7, seed=1)
    write_output(away.parent / "out", expected, format="npy")
    write_output(away / "out", other)
    features = stellar_fast.open_features("out")
    packed = pickle.dumps(features)
    os.chdir(away)
    for found in (features, pickle.loads(packed)):
        np.testing.assert_array_equal(found["cls"][:], expected["cls"])
        assert len(found.ids) == 7 and found.ids_of([6]) == found.ids[-1:]
        found.verify()
        assert found.dataset()[3]["cls"].numpy().tolist() == expected["cls"][3].tolist()


def test_an_output_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_output(tmp_path / "out", made_up(2))
    assert len(stellar_fast.open_features("~/out")) == 2


# Weights


def write_tiny(folder, seed):
    backbone = asdict(BACKBONE)
    write_checkpoint(
        folder, "tiny", backbone=backbone, num_sparse_tokens=2, num_decoder_layers=1, seed=seed
    )
    return folder / "tiny.safetensors"


def test_weights_are_those_that_were_loaded(away):
    path = write_tiny(away.parent / "repo", seed=0)
    other = write_tiny(away / "other", seed=1).read_bytes()
    loaded = sha256_of(path)
    engine = stellar_fast.load("tiny", repo="./repo", device="cpu")
    assert identify(engine)["weights"] == f"sha256:{loaded}"
    os.chdir(away)
    assert identify(engine)["weights"] == f"sha256:{loaded}"
    path.write_bytes(other)  # in place
    assert identify(engine)["weights"] == f"sha256:{loaded}"
    path.unlink()
    assert identify(engine)["weights"] == f"sha256:{loaded}"


# Rows


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "out"
    write_output(folder, made_up(7))
    return stellar_fast.open_features(folder)


@pytest.mark.parametrize(
    "index",
    [
        *((0, 1), (0,), (), (slice(2), 0), ..., None, True, np.bool_(False), 1.0, "0", [[0, 1]]),
        *(1j, np.uint64(2**64 - 1), [2**63], np.array([2**64 - 7], np.uint64), 7, -8),
    ],
    ids=repr,
)
def test_what_chooses_no_rows_is_an_error(index, features):
    with pytest.raises(IndexError):
        features["sparse"][index]


@pytest.mark.parametrize(
    "index",
    [
        *(0, -1, np.int8(-7), torch.tensor(3), [0, 1], [-1, 0], np.array([1], np.uint64)),
        *(range(3), [], slice(1, 6, 2), slice(None, None, -1), [True] * 3 + [False] * 4),
        torch.tensor([2, 2]),
    ],
    ids=repr,
)
def test_rows_are_those_of_numpy(index, features):
    whole = features["sparse"].to_numpy()
    expected = whole[np.asarray(index, int) if isinstance(index, list) and not index else index]
    np.testing.assert_array_equal(features["sparse"][index], np.asarray(expected))


# Labels


@pytest.mark.parametrize(
    ("id", "label"),
    [
        ("cat/1.jpg", "cat"),
        ("train/cat/1.jpg", "cat"),
        ("./cat//1.jpg", "cat"),
        ("a.tar::cat/1.jpg", "cat"),
        ("x/a.TAR::./cat/1.jpg", "cat"),
        ("a.tar?0123456789abcdef::cat/1.jpg", "cat"),
        ("a.tar::x/cat/1.jpg", "cat"),
        ("cat/a.tar::1.jpg", "cat"),
        ("a::b/1.jpg", "a::b"),
        ("/data/cat/1.jpg", "cat"),
        ("https://host/x/cat/1.jpg?0123456789abcdef", "cat"),
        ("s3://bucket/cat/1.jpg", "cat"),
        ("zip://cat/1.jpg::https://host/x/a.zip", "cat"),
        ("file:///data/cat/1.jpg", "cat"),
    ],
)
def test_labels_are_folders_wherever_they_are(id, label):
    assert probe._label(id) == label


@pytest.mark.parametrize(
    "id", ["1.jpg", "a.tar::1.jpg", "./1.jpg", "https://host/1.jpg", "zip://1.jpg::/x/a.zip"]
)
def test_what_is_in_no_folder_has_no_label(id):
    with pytest.raises(ValueError, match="in no folder"):
        probe._label(id)
