"""The recipe that goes on with pretraining, on drawn photographs."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from pretraining import TINY, tiny_model

import stellar_fast
from stellar_fast import photos
from stellar_fast.recipes import pretrain
from stellar_fast.reference import STELLARModel

PHOTOGRAPHS = 8


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    scenes = list(photos.SCENES)
    for index in range(PHOTOGRAPHS):
        place = root / "below" if index % 2 else root
        place.mkdir(exist_ok=True)
        photos.draw(scenes[index % len(scenes)], 120, 90, index).save(place / f"{index}.jpg")
    return root


def run(photographs, output, model=None, **arguments):
    settings = {"epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "say": lambda line: None}
    model = model or tiny_model(seed=2, masking_ratio=0.5, focal_mode="gaussian")
    return model, pretrain.pretrain(model, photographs, output, **settings | arguments)


def test_losses_fall_and_the_weights_load_again(photographs, tmp_path):
    before = tiny_model(seed=2).state_dict()
    lines = []
    model, history = run(photographs, tmp_path / "out", epochs=6, say=lines.append)
    names = {"koleo_loss", "MSE", "clustering_loss", "cls_clustering_loss", "mask_loss"}
    assert history[0].keys() == names | {"cls_loss", "total"}
    totals = [epoch["total"] for epoch in history]
    assert totals[-1] < 0.9 * totals[0]
    assert len(lines) == 6 and lines[-1].startswith("epoch 6 of 6")
    state = model.state_dict()
    assert not torch.equal(state["sparse_tokens"], before["sparse_tokens"])

    again = stellar_fast.load_stellar(
        "stellar", "pretrain", repo_id=tmp_path / "out", prototype_dim=8
    )
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    engine = stellar_fast.load("stellar", repo=tmp_path / "out", device="cpu")
    assert engine.encode(torch.rand(1, 3, 64, 64))["cls"].isfinite().all()
    by_path = tiny_model(seed=3, model_checkpoint_path=tmp_path / "out" / "last.ckpt")
    assert isinstance(by_path, STELLARModel)


def test_a_run_that_was_broken_off_goes_on_with_the_same_numbers(photographs, tmp_path):
    teacher = {"momentum_teacher": True, "teacher_momentum": 0.5, "teacher_momentum_final": 1.0}
    straight, history = run(photographs, tmp_path / "straight", tiny_model(**teacher), epochs=2)
    assert straight.teacher_momentum_schedule_steps == 4
    lines = []

    class BrokenOff(Exception):
        pass

    def say(line):
        lines.append(line)
        if len(lines) == 2:
            raise BrokenOff

    with pytest.raises(BrokenOff):
        run(photographs, tmp_path / "out", tiny_model(**teacher), epochs=2, say=say)
    model, rest = run(photographs, tmp_path / "out", tiny_model(**teacher), epochs=2)
    assert rest == history[1:]
    expected = straight.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.teacher_momentum == straight.teacher_momentum


def test_mixed_precision_and_photographs_that_cannot_be_read(photographs, tmp_path):
    (tmp_path / "in").mkdir()
    for path in photographs.glob("*.jpg"):
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    with pytest.warns(RuntimeWarning, match=r"broken\.jpg"):
        _, history = run(
            tmp_path / "in", tmp_path / "out", epochs=1, batch_size=5, precision="bf16"
        )
    assert all(value == value for value in history[0].values())


def test_what_cannot_be_trained_on_is_refused(photographs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in this folder"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="8 photographs a process do not fill a batch of 9"):
        run(photographs, tmp_path / "out", batch_size=9)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp8'"):
        run(photographs, tmp_path / "out", precision="fp8")


@pytest.fixture
def command(photographs, tmp_path):
    """Arguments of the command line for a tiny model."""
    write_checkpoint(
        tmp_path / "model",
        "tiny",
        backbone=asdict(TINY),
        num_sparse_tokens=4,
        num_decoder_layers=1,
        pixel_head=True,
    )
    shared = ["--model", "tiny", "--repo", str(tmp_path / "model"), "--views", "2"]
    shared += ["--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    return lambda output: [str(photographs), str(output), *shared]


def test_the_command_line(command, tmp_path, capsys):
    pretrain.main(command(tmp_path / "out"))
    assert "epoch 1 of 1" in capsys.readouterr().out
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["models"]["stellar"]
    assert (entry["num_clusters"], entry["recon_type"]) == (16384, "pixel")


@pytest.mark.slow
def test_two_processes_by_torchrun(command, tmp_path):
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "-m"]
    recipe = ["stellar_fast.recipes.pretrain", *command(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", *launch, *recipe],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1 of 1") == 1
    assert stellar_fast.load("stellar", repo=tmp_path / "out", device="cpu")
