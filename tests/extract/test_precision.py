"""The precision of an extraction: that of its plan, and int8 with scales of its own."""

import json

import numpy as np
import pytest
from checkpoints import write_checkpoint
from engines import SMALL
from PIL import Image
from typer.testing import CliRunner

import stellar_fast
from stellar_fast import precision as precisions
from stellar_fast.cli import app
from stellar_fast.engine import backends
from stellar_fast.extract import make_job
from stellar_fast.extract.precision import planned

needs_int8 = pytest.mark.skipif(
    not backends.has_openvino() or not precisions.has_int8_units(),
    reason="int8 needs OpenVINO (extra cpu) and a processor with 8-bit products",
)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("repo"), "small", backbone=SMALL, num_sparse_tokens=8
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for index in range(9):
        pixels = generator.integers(0, 256, (40 + index, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def extract(photographs, output, repo, *more):
    common = ("--model", "small", "--repo", repo, "--device", "cpu", "--workers", 1)
    return run("extract", photographs, output, *common, *more)


@needs_int8
def test_int8_keeps_its_scales_and_goes_on_with_them(photographs, repo, tmp_path):
    done = extract(photographs, tmp_path / "out", repo, "--precision", "int8")
    assert done.exit_code == 3, done.output  # one image is broken
    assert f"int8 calibrated on 9 images of the input, kept in {tmp_path / 'out'}" in done.output
    configuration = json.loads((tmp_path / "out" / "plan.json").read_text())["configuration"]
    assert configuration["precision"] == "int8"
    weights = tmp_path / "out" / "engine" / "small-int8.safetensors"
    assert configuration["weights"].startswith("sha256:") and weights.is_file()

    engine = stellar_fast.load("small", repo=tmp_path / "out" / "engine", device="cpu")
    features = stellar_fast.open_features(tmp_path / "out")
    pixels = stellar_fast.images.load_image(photographs / "3.png", "card")
    alone = engine.encode(pixels[None], outputs=("cls",))["cls"]
    row = list(features.ids).index("3.png")
    np.testing.assert_allclose(features["cls"][row], alone[0].numpy(), rtol=0.1, atol=0.1)

    before, kept = weights.stat().st_mtime_ns, (tmp_path / "out" / "plan.json").read_bytes()
    for more in (("--precision", "int8"), (), ("--resume",)):  # auto takes the plan's
        again = extract(photographs, tmp_path / "out", repo, *more)
        assert again.exit_code == 3 and "calibrated" not in again.output, again.output
    assert weights.stat().st_mtime_ns == before
    assert (tmp_path / "out" / "plan.json").read_bytes() == kept
    anew = extract(photographs, tmp_path / "out", repo, "--precision", "int8", "--overwrite")
    assert "int8 calibrated" in anew.output and weights.stat().st_mtime_ns > before


@needs_int8
def test_int8_of_nothing_readable_and_of_no_output(photographs, repo, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    done = extract(tmp_path / "in", tmp_path / "out", repo, "--precision", "int8")
    assert done.exit_code == 1 and "none of 1 images can be read" in done.output
    dummy = extract(photographs, tmp_path / "dummy", repo, "--precision", "int8", "--dummy-writer")
    assert dummy.exit_code == 1 and "a dummy writer has none" in dummy.output
    assert not (tmp_path / "dummy").exists()


def test_auto_takes_the_precision_of_the_plan(photographs, repo, tmp_path):
    out = tmp_path / "out"
    assert planned(make_job(photographs, out), "auto") == "auto"
    done = extract(photographs, out, repo, "--precision", "fp32", "--plan-only")
    assert done.exit_code == 0, done.output
    assert planned(make_job(photographs, out), "auto") == "fp32"
    assert planned(make_job(photographs, out), "bf16") == "bf16"
    assert planned(make_job(photographs, out, overwrite=True), "auto") == "auto"


def test_the_fidelity_command(photographs, repo, tmp_path):
    common = ("--model", "small", "--repo", repo, "--device", "cpu")
    picture = tmp_path / "fidelity.png"
    done = run("fidelity", photographs, *common, "--precision", "bf16", "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "bf16 on " in done.output and "against fp32, 9 images" in done.output
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 200
    few = run("fidelity", photographs, *common, "--precision", "fp32", "--images", 3)
    assert "3 images" in few.output and "sparse" in few.output


def test_the_fidelity_of_scaled_decoding(repo, tmp_path):
    """In float32, what is left is what the smaller picture changes."""
    (tmp_path / "in").mkdir()
    picture = Image.effect_noise((1856, 1024), 90).convert("RGB")
    picture.save(tmp_path / "in" / "large.jpg")
    common = ("--model", "small", "--repo", repo, "--device", "cpu", "--precision", "fp32")
    errors = []
    for flag in ((), ("--scaled-decode",)):
        done = run("fidelity", tmp_path / "in", *common, *flag)
        assert done.exit_code == 0, done.output
        (line,) = [line for line in done.output.splitlines() if line.startswith("dense ")]
        errors.append(float(line.split()[1]))
    assert errors[0] == 0 < errors[1]
    wrong = run("fidelity", tmp_path / "in", *common, "--preset", "eval", "--scaled-decode")
    assert wrong.exit_code == 1 and "'eval' reads single pixels" in wrong.output


@needs_int8
def test_the_fidelity_of_int8_is_measured_on_other_images(photographs, repo, tmp_path):
    common = ("--model", "small", "--repo", repo, "--device", "cpu", "--precision", "int8")
    done = run("fidelity", photographs, *common)
    assert done.exit_code == 0 and "int8 on openvino against fp32, 4 images" in done.output
    one = run("fidelity", photographs / "1.png", *common)
    assert one.exit_code == 1
