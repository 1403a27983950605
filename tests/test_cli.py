"""The command line, on checkpoints of a small model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint, write_vqgan
from engines import SMALL
from extracting import index, touch
from pictures import photograph
from PIL import Image
from scenes import write_photographs
from typer.testing import CliRunner

import stellar_fast
from stellar_fast import cli, extract, pictures
from stellar_fast.images import load_image

BATCH = 16


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """A local folder in the published layout: two small models, and the tokenizer."""
    root = tmp_path_factory.mktemp("repo")
    geometry = {"backbone": SMALL, "num_sparse_tokens": 8, "num_decoder_layers": 1}
    write_checkpoint(root, "small", **geometry)
    write_checkpoint(root, "pixel", pixel_head=True, **geometry)
    write_vqgan(root / "vq.safetensors", seed=7)
    return root


@pytest.fixture
def picture(tmp_path) -> Path:
    photograph(300, 200).save(tmp_path / "photograph.jpg")
    return tmp_path / "photograph.jpg"


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def small(repo: Path, model: str = "small") -> tuple:
    return ("--repo", repo, "--model", model, "--precision", "fp32", "--device", "cpu")


def command(*arguments) -> list[str]:
    return [sys.executable, "-P", "-m", "stellar_fast", *map(str, arguments)]


def refused(result, pattern: str) -> None:
    """One line on stderr, exit status 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(pattern, result.stderr), result.stderr


# 200 photographs and 20 broken files


@pytest.fixture(scope="module")
def extracted(repo, tmp_path_factory):
    """(photographs, the broken ones' names, output, finished process)."""
    root = tmp_path_factory.mktemp("acceptance")
    broken = write_photographs(root / "photographs", good=200, broken=20)
    output = root / "features"
    arguments = ("extract", root / "photographs", output, *small(repo), "--batch-size", BATCH)
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=root)
    return root / "photographs", broken, output, done


def test_exit_status_and_summary_say_that_some_failed(extracted):
    _, _, output, done = extracted
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(
        rf"{output}: 220 images, 200 rows, 20 failed, [\d.]+ s, [\d.]+ images/s\n", done.stdout
    )
    assert "index.parquet" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_200_rows_equal_encode_on_the_same_pixels(extracted, repo):
    photographs, broken, output, _ = extracted
    table = index(output)
    good = [path for path, row in zip(table["path"], table["row"], strict=True) if row is not None]
    assert len(good) == 200
    assert not set(good) & set(broken)
    engine = stellar_fast.load("small", repo=repo, precision="fp32", device="cpu")
    pixels = torch.stack([load_image(photographs / path, "card") for path in good])
    parts = [engine.encode(part, outputs=("sparse", "cls")) for part in pixels.split(BATCH)]
    for name in ("sparse", "cls"):
        stored = np.load(output / f"{name}.npy")
        assert stored.dtype == np.float32
        together = torch.cat([part[name] for part in parts]).numpy()
        np.testing.assert_array_equal(stored, together)
        # Rows are far apart, so a shifted row would show.
        alone = engine.encode(pixels[137:138], outputs=(name,))[name][0].numpy()
        distances = np.abs(stored - alone).max(axis=(1, 2))
        assert distances.argmin() == 137
        assert distances[137] < 1e-4 * np.abs(alone).max() < np.delete(distances, 137).min()


def test_the_20_broken_files_are_lines_with_reasons(extracted):
    photographs, broken, output, _ = extracted
    table = index(output)
    assert table["path"] == sorted(
        path.relative_to(photographs).as_posix() for path in photographs.rglob("*.*")
    )
    failed = {
        path: reason
        for path, status, reason in zip(
            table["path"], table["status"], table["reason"], strict=True
        )
        if status == "failed"
    }
    assert sorted(failed) == broken
    assert all(failed.values())
    assert [row for row in table["row"] if row is not None] == list(range(200))
    facts = json.loads((output / "run.json").read_text())
    assert (facts["images"], facts["rows"], facts["failed"]) == (220, 200, 20)
    assert facts["model"] == "small"


def test_an_interrupted_command_leaves_nothing(extracted, repo, tmp_path):
    photographs, _, _, _ = extracted
    arguments = ("extract", photographs, tmp_path / "out", *small(repo), "--batch-size", 1)
    # A background job of a shell, and so what it starts, would ignore SIGINT.
    listening = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from stellar_fast.cli import main; main()"
    )
    started = [sys.executable, "-P", "-c", listening, *map(str, arguments)]
    with subprocess.Popen(
        started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.partial-*/sparse.npy")):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, stderr
    assert stderr == "error: interrupted\n"
    assert os.listdir(tmp_path) == []


# extract


def test_all_good_is_exit_status_0(repo, picture, tmp_path):
    result = invoke("extract", tmp_path, tmp_path / "out", *small(repo), "--features", "spatial")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert sorted(os.listdir(tmp_path / "out")) == ["index.parquet", "run.json", "spatial.npy"]
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["weights"] == str(repo / "small.safetensors")
    assert facts["repo"] == str(repo)
    assert facts["precision"] == "fp32"


def test_every_option_reaches_its_place(repo, picture, tmp_path, monkeypatch):
    loaded, planned = {}, {}
    load, plan = stellar_fast.load, extract.plan
    monkeypatch.setattr(
        stellar_fast.loading, "load", lambda *a, **k: (loaded.update(k), load(*a, **k))[1]
    )
    monkeypatch.setattr(extract, "plan", lambda *a, **k: (planned.update(k), plan(*a, **k))[1])
    arguments = "--dtype float16 --batch-size 5 --preset eval --precision bf16 --workers 3"
    flags = "--features cls,dense --overwrite --local-files-only --revision main --device cpu"
    result = invoke(
        *("extract", tmp_path, tmp_path / "out", "--repo", repo, "--model", "small"),
        *f"{arguments} {flags}".split(),
    )
    assert result.exit_code == 0, result.output
    assert planned == {
        "features": ["cls", "dense"],
        "dtype": "float16",
        "preset": "eval",
        "batch_size": 5,
        "workers": 3,
        "overwrite": True,
    }
    assert loaded == {
        "repo": str(repo),
        "weights": "pretrained",
        "precision": "bf16",
        "device": "cpu",
        "max_batch": 5,
        "revision": "main",
        "local_files_only": True,
    }


def test_synthetic_weights_say_so(repo, picture, tmp_path):
    arguments = ("extract", tmp_path, tmp_path / "out", *small(repo), "--weights", "synthetic")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "synthetic" in result.stderr
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["weights"] == "synthetic"
    assert "repo" not in facts


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--features", "sparse,lowrank"), "spatial @ sparse"),
        (("--dtype", "float64"), "float64"),
        (("--batch-size", "0"), "batch size"),
        (("--preset", "crop"), "crop"),
        (("--model", "smal"), "smal"),
        (("--device", "toaster"), "toaster"),
        (("--precision", "fp4"), "fp4"),
        (("--weights", "random"), "random"),
    ],
)
def test_wrong_arguments_are_one_line(repo, picture, tmp_path, arguments, pattern):
    result = invoke("extract", tmp_path, tmp_path / "out", *small(repo), *arguments)
    refused(result, pattern)
    assert not (tmp_path / "out").exists()


def test_outputs_are_refused_before_any_model_is_loaded(picture, tmp_path):
    touch(tmp_path / "out", "thesis.tex")
    nowhere = ("--repo", tmp_path / "no-such-folder")
    refused(invoke("extract", tmp_path, tmp_path / "out", *nowhere), "not empty")
    refused(invoke("maps", picture, tmp_path / "no" / "out.png", *nowhere), "there is no folder")
    refused(invoke("maps", picture, tmp_path / "out.gif", *nowhere), "PNG")
    refused(invoke("reconstruct", picture, tmp_path / "out.gif", *nowhere), "PNG")
    refused(invoke("reconstruct", picture, tmp_path / "out.png", *nowhere), "no-such-folder")


def test_debug_shows_the_traceback(tmp_path):
    arguments = ("extract", tmp_path / "nothing", tmp_path / "out", "--debug")
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no such folder or list" in done.stderr


# maps, reconstruct


@pytest.mark.parametrize("preset", ["card", "eval"])
def test_maps_writes_a_picture(repo, picture, tmp_path, preset):
    out = tmp_path / "maps.png"
    result = invoke("maps", picture, out, *small(repo), "--preset", preset)
    assert result.exit_code == 0, result.output
    assert min(Image.open(out).size) > 100
    assert sorted(os.listdir(tmp_path)) == ["maps.png", "photograph.jpg"]


def test_maps_without_matplotlib_names_the_extra(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "has_viz", lambda: False)
    refused(invoke("maps", picture, tmp_path / "maps.png"), r"stellar-fast\[viz\]")


@pytest.mark.parametrize("model", ["small", "pixel"])
def test_reconstruct_writes_what_the_engine_makes(repo, picture, tmp_path, model):
    out, vq_model = tmp_path / "again.png", repo / "vq.safetensors" if model == "small" else None
    tokenizer = ("--vq-model", vq_model) if vq_model else ()
    result = invoke("reconstruct", picture, out, *small(repo, model), *tokenizer)
    assert result.exit_code == 0, result.output
    engine = stellar_fast.load(
        model, repo=repo, purpose="reconstruct", vq_model=vq_model, precision="fp32", device="cpu"
    )
    features = engine.encode([picture], outputs=("lowrank",))
    expected = engine.reconstruct(features)["reconstruction"][0].clamp(0, 1)
    found = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1) / 255
    assert (found - expected).abs().max() <= 0.51 / 255


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


def test_the_demo_runs_offline_and_says_what_it_is(tmp_path):
    """In a process whose sockets do not connect."""
    blocked = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('the demo used the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"sys.argv = ['stellar-fast', 'demo', '--out', {str(tmp_path / 'demo')!r}]\n"
        "from stellar_fast.cli import main; main()"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 60
    assert "SYNTHETIC" in done.stdout.splitlines()[0]
    for stage in ("weights", "photographs", "features", "maps"):
        assert re.search(rf"{stage} +[\d.]+ s ", done.stdout), done.stdout
    demo = tmp_path / "demo"
    assert sorted(os.listdir(demo)) == ["features", "maps.png", "photographs"]
    photographs = sorted(os.listdir(demo / "photographs"))
    assert all(Image.open(demo / "photographs" / name).format == "JPEG" for name in photographs)
    assert index(demo / "features")["path"] == photographs
    assert np.load(demo / "features" / "sparse.npy").shape == (len(photographs), 16, 768)
    facts = json.loads((demo / "features" / "run.json").read_text())
    assert facts["weights"] == "synthetic"
    assert facts["input"] == str(demo / "photographs")


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


@pytest.mark.parametrize("arguments", [("--help",), ("models",), ("extract", "--help")])
def test_help_and_models_import_nothing_heavy(arguments):
    probe = (
        "import sys; from stellar_fast.cli import app\n"
        f"app({list(arguments)!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_wrong_usage_is_exit_status_2():
    assert invoke("extract", "--no-such-option").exit_code == 2
