"""The command line, on checkpoints of a small model."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import command, invoke, refused, small, write_models
from extracting import feature, index, touch
from pictures import photograph
from PIL import Image

import stellar_fast
from stellar_fast import cli, demo, images, photos
from stellar_fast.viz import pictures


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def picture(tmp_path) -> Path:
    photograph(300, 200).save(tmp_path / "photograph.jpg")
    return tmp_path / "photograph.jpg"


def test_outputs_are_refused_before_any_model_is_loaded(picture, tmp_path):
    touch(tmp_path / "out", "thesis.tex")
    nowhere = ("--repo", tmp_path / "no-such-folder")
    refused(invoke("extract", tmp_path, tmp_path / "out", *nowhere), "not empty")
    refused(invoke("maps", picture, tmp_path / "no" / "out.png", *nowhere), "there is no folder")
    refused(invoke("maps", picture, tmp_path / "out.gif", *nowhere), r"OUT\.png or OUT\.pdf")
    refused(invoke("reconstruct", picture, tmp_path / "out.pdf", *nowhere), r"OUT\.png, by its")
    refused(invoke("reconstruct", picture, tmp_path / "out.png", *nowhere), "no-such-folder")


def test_debug_shows_the_traceback(tmp_path):
    arguments = ("extract", tmp_path / "nothing", tmp_path / "out", "--debug")
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no such folder, list or tar" in done.stderr


# maps, reconstruct


@pytest.mark.parametrize("preset", ["card", "eval"])
def test_maps_writes_a_picture(repo, picture, tmp_path, preset):
    out = tmp_path / "maps.png"
    result = invoke("maps", picture, out, *small(repo), "--preset", preset)
    assert result.exit_code == 0, result.output
    assert min(Image.open(out).size) > 100
    assert sorted(os.listdir(tmp_path)) == ["maps.png", "photograph.jpg"]


def test_maps_of_the_largest_tokens_as_a_pdf(repo, picture, tmp_path):
    out = tmp_path / "maps.pdf"
    result = invoke("maps", picture, out, *small(repo), "--top", "3")
    assert result.stdout == f"{out}: 3 maps\n"
    assert out.read_bytes().startswith(b"%PDF")
    assert invoke("maps", picture, out, *small(repo), "--top", "99").stdout == f"{out}: 8 maps\n"
    assert invoke("maps", picture, out, *small(repo), "--top", "0").exit_code == 2


def test_maps_without_matplotlib_names_the_extra(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "has_viz", lambda: False)
    refused(invoke("maps", picture, tmp_path / "maps.png"), r"stellar-fast\[viz\]")


@pytest.mark.parametrize("model", ["small", "pixel"])
def test_reconstruct_writes_what_the_engine_makes(repo, picture, tmp_path, monkeypatch, model):
    made = []

    def reconstruct(engine, features):
        made.append((features, plain(engine, features)))
        return made[-1][1]

    plain = stellar_fast.Engine.reconstruct
    monkeypatch.setattr(stellar_fast.Engine, "reconstruct", reconstruct)
    out, vq_model = tmp_path / "again.png", repo / "vq.safetensors" if model == "small" else None
    tokenizer = ("--vq-model", vq_model) if vq_model else ()
    result = invoke("reconstruct", picture, out, *small(repo, model), *tokenizer)
    assert result.exit_code == 0, result.output
    ((features, pixels),) = made
    engine = stellar_fast.load(model, repo=repo, precision="fp32", device="cpu")
    wanted = engine.encode([picture], outputs=("lowrank",))
    assert torch.equal(features["lowrank"], wanted["lowrank"])
    expected = pixels["reconstruction"][0].clamp(0, 1)
    found = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1) / 255
    assert (found - expected).abs().max() <= 0.51 / 255


def test_reconstruct_with_the_original_beside_it(repo, picture, tmp_path):
    alone, both = tmp_path / "again.png", tmp_path / "both.png"
    assert invoke("reconstruct", picture, alone, *small(repo, "pixel")).exit_code == 0
    result = invoke("reconstruct", picture, both, *small(repo, "pixel"), "--beside")
    assert result.exit_code == 0, result.output
    made, pair = np.asarray(Image.open(alone)), np.asarray(Image.open(both))
    height, width = made.shape[:2]
    assert pair.shape == (height + pictures.CAPTION, 2 * width + pictures.GAP, 3)
    np.testing.assert_array_equal(pair[:height, -width:], made)
    seen = images.load_image(picture, "card").permute(1, 2, 0).numpy()
    small_again = Image.fromarray(pair[:height, :width]).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    assert np.abs(np.asarray(small_again).astype(int) - seen).mean() < 3
    for caption in (pair[height:, :width], pair[height:, -width:]):
        assert caption.min() < 50
        assert caption.max() == 255


def test_pictures_say_that_weights_are_synthetic(repo, picture, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pictures, "save_spatial", lambda *given: said.append(given[4]))
    monkeypatch.setattr(pictures, "save_beside", lambda *given: said.append(given[3]))
    monkeypatch.setattr(pictures, "save_fidelity", lambda *given: said.append(given[2]))
    for weights in ("synthetic", "elsewhere"):
        engine = small_engine(weights)
        monkeypatch.setattr(cli, "_load", lambda *given, engine=engine, **named: engine)
        for arguments in (
            ("maps", picture, tmp_path / "a.png"),
            ("reconstruct", picture, tmp_path / "a.png", "--beside"),
            ("fidelity", tmp_path, "--plot", tmp_path / "a.png"),
        ):
            result = invoke(*arguments)
            assert result.exit_code == 0, (arguments, result.output, result.exception)
    assert [" (synthetic weights)" in text for text in said] == [True] * 3 + [False] * 3


def small_engine(weights: str):
    """What `load` gives, as far as the commands ask for it."""

    class Fidelity:
        def __str__(self) -> str:
            return ""

    config = SimpleNamespace(name="small", num_sparse_tokens=8)
    made = {"reconstruction": torch.zeros(1, 3, 8, 8)}
    return SimpleNamespace(
        weights=weights,
        config=config,
        encode=lambda *given, **named: {},
        reconstruct=lambda features: made,
        fidelity=lambda *given, **named: Fidelity(),
    )


def test_reconstruct_without_its_tokenizer_says_which_file(repo, picture, tmp_path):
    result = invoke("reconstruct", picture, tmp_path / "out.png", *small(repo))
    refused(result, "maskgit-vqgan-imagenet-f16-256.bin")
    assert not (tmp_path / "out.png").exists()


def test_a_broken_image_is_one_line(repo, tmp_path):
    touch(tmp_path, "a.jpg")
    for name in ("maps", "reconstruct"):
        refused(invoke(name, tmp_path / "a.jpg", tmp_path / "out.png", *small(repo)), "empty file")


def test_a_picture_that_cannot_be_written_is_one_line(repo, picture, tmp_path, monkeypatch):
    def full(image, path, *arguments):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "out.png").write_bytes(b"earlier")
    monkeypatch.setattr(Image.Image, "save", full)
    result = invoke("reconstruct", picture, tmp_path / "out.png", *small(repo, "pixel"))
    refused(result, "out.png: cannot be written: No space left")
    assert (tmp_path / "out.png").read_bytes() == b"earlier"
    assert sorted(os.listdir(tmp_path)) == ["out.png", "photograph.jpg"]


# demo, models, help


def check_demo(stdout: str, folder: Path, features: tuple[int, ...]) -> None:
    assert "SYNTHETIC" in stdout.splitlines()[0]
    for stage in ("weights", "photographs", "features", "maps"):
        assert re.search(rf"{stage} +[\d.]+ s ", stdout), stdout
    assert sorted(os.listdir(folder)) == ["features", "maps.png", "photographs"]
    photographs = sorted(os.listdir(folder / "photographs"))
    assert all(Image.open(folder / "photographs" / name).format == "JPEG" for name in photographs)
    assert index(folder / "features")["id"] == photographs
    assert feature(folder / "features", "sparse").shape == (len(photographs), *features)
    plan = json.loads((folder / "features" / "plan.json").read_text())
    assert plan["configuration"]["weights"] == "synthetic"
    assert plan["configuration"]["input"] == str(folder / "photographs")


def test_the_demo_runs_offline_and_says_what_it_is(repo, tmp_path, monkeypatch):
    """With a model, photographs and a process smaller than a user's."""
    connect = socket.socket.connect

    def refuse(*_, **__):
        raise AssertionError("the demo used the network")

    def local(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(demo, "load", functools.partial(stellar_fast.load, repo=repo))
    monkeypatch.setattr(demo, "PHOTOGRAPHS", 2)
    monkeypatch.setattr(photos, "SIZES", ((96, 64), (64, 96)))
    result = invoke("demo", "--out", tmp_path / "demo", "--model", "small")
    assert result.exit_code == 0, result.output
    check_demo(result.stdout, tmp_path / "demo", (8, 64))


@pytest.mark.slow
def test_the_demo_as_it_is(tmp_path):
    """In a process whose sockets do not connect."""
    blocked = (
        "import socket, sys\n"
        "connect = socket.socket.connect\n"
        "def refuse(*a, **k): raise AssertionError('the demo used the network')\n"
        "def local(s, a): connect(s, a) if s.family == socket.AF_UNIX else refuse()\n"
        "socket.socket.connect, socket.getaddrinfo = local, refuse\n"
        f"sys.argv = ['stellar-fast', 'demo', '--out', {str(tmp_path / 'demo')!r}]\n"
        "from stellar_fast.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_demo(done.stdout, tmp_path / "demo", (16, 768))


def test_the_demo_refuses_a_folder_that_holds_something(tmp_path):
    touch(tmp_path, "thesis.tex")
    refused(invoke("demo", "--out", tmp_path), "not empty")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_the_demo_of_an_unknown_model_leaves_nothing(tmp_path):
    result = invoke("demo", "--out", tmp_path / "demo", "--model", "stellar-x")
    assert result.exit_code == 1
    assert "stellar-b16" in result.stderr
    assert os.listdir(tmp_path) == []


def test_models_is_a_table_of_all_models():
    result = invoke("models")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == stellar_fast.list_models()
    assert lines[3].split() == [
        *("stellar-h16", "1280", "32", "16", "14", "16", "256", "stellar-h16.safetensors")
    ]


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"stellar-fast {stellar_fast.__version__}\n")


def test_help_and_models_import_nothing_heavy():
    probe = (
        "import sys; from stellar_fast.cli import app\n"
        "for arguments in (['--help'], ['models'], ['extract', '--help']):\n"
        "    app(arguments, standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_wrong_usage_is_exit_status_2():
    assert invoke("extract", "--no-such-option").exit_code == 2
