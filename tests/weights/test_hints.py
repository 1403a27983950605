"""Checkpoints that are nearly right: what to do about them."""

import json
import os
import sys
from dataclasses import asdict

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import BACKBONE

import stellar_fast
from stellar_fast import CheckpointError


def write(folder, **options):
    write_checkpoint(
        folder,
        "tiny",
        backbone=asdict(BACKBONE),
        num_sparse_tokens=2,
        num_decoder_layers=1,
        **options,
    )
    return folder / "tiny.safetensors"


@pytest.mark.parametrize("spelling", ["published", "renamed"])
@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("module.", "DataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module.model.", "DataParallel"),
    ],
)
def test_names_of_a_wrapped_module(spelling, prefix, wrapper, tmp_path):
    write(tmp_path, prefix=prefix, spelling=spelling)
    first = prefix.partition("model.")[0]
    with pytest.raises(CheckpointError, match=rf"begin with {first}, which {wrapper}.*state_dict"):
        stellar_fast.load("tiny", repo=tmp_path, device="cpu")


def test_names_of_something_else(tmp_path):
    path = write(tmp_path)
    save_file({f"other.{name}": value for name, value in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="Is this the file of this model"):
        stellar_fast.load("tiny", repo=tmp_path, device="cpu")


def test_the_index_of_several_files(tmp_path):
    path = write(tmp_path)
    names = dict.fromkeys(load_file(path), "model-00001-of-00002.safetensors")
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": names}, indent=2))
    with pytest.raises(CheckpointError, match="index of a checkpoint in several files; put them"):
        stellar_fast.load("tiny", repo=tmp_path, device="cpu")


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xe9")
    write(folder)
    here = {"device": "cpu", "backend": "torch"}
    engine = stellar_fast.load("tiny", repo=folder, **here)
    engine.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / os.fsdecode(b"\xe8"))
    again = stellar_fast.load("tiny", repo=tmp_path / os.fsdecode(b"\xe8"), **here)
    images = torch.zeros(1, 3, 16, 16)
    assert torch.equal(engine.encode(images)["cls"], again.encode(images)["cls"])


def test_loading_without_stderr(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    assert stellar_fast.load("tiny", repo=tmp_path, device="cpu").max_batch > 0
