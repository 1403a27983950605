"""The sandbox of decoding processes: every limit meets an attack, among honest neighbours."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bombs
import numpy as np
import psutil
import pytest
from attacks import attacked_work
from extracting import SUPPORT, feature, index, parts
from pictures import photograph, saved
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin

from stellar_fast import images
from stellar_fast.extract import make_job, run
from stellar_fast.extract.records import Item
from stellar_fast.extract.work import sandbox, workers
from stellar_fast.extract.work.sandbox import Limits

MIB = 1 << 20
HONEST = ("a", "b", "d", "e", "f", "h")
BAD = ("c", "g")


def extract(root: Path, engine, attack: str, monkeypatch, content=None, count=1, **options) -> dict:
    """The index of an extraction of honest images and two bad ones, whose rows must be right."""
    for folder in ("in", "honest"):
        (root / folder).mkdir()
        for name in HONEST:
            photograph(60, 50, seed=ord(name)).save(root / folder / f"{name}.png")
    for name in BAD:
        path = root / "in" / f"{name}-{attack}.png"
        path.write_bytes(content or saved(photograph(60, 50), "PNG"))
    if content is None:
        monkeypatch.setattr(workers, "work", attacked_work)
    run(make_job(root / "in", root / "out", batch_size=16, workers=count, **options), engine)
    table = index(root / "out")
    run(make_job(root / "honest", root / "alone", batch_size=16, workers=1), engine)
    alone = feature(root / "alone", "cls")
    np.testing.assert_array_equal(feature(root / "out", "cls"), alone)
    shutil.rmtree(root / "alone")
    return table


def reasons(table: dict) -> set[str]:
    return {reason for reason in table["reason"] if reason is not None}


@pytest.mark.parametrize("attack", ["hang", "loop"])
def test_a_decoder_that_does_not_return_is_ended(tmp_path, engine, monkeypatch, attack):
    table = extract(tmp_path, engine, attack, monkeypatch, decode_seconds=2)
    assert reasons(table) == {"decoding took more than 2 s, twice"}


@pytest.mark.parametrize("attack", ["eat", "one-bite", "crumbs"])
def test_a_decoder_that_takes_memory_without_end_is_stopped(tmp_path, engine, monkeypatch, attack):
    table = extract(tmp_path, engine, attack, monkeypatch, worker_memory=300)
    assert reasons(table) == {"needs more than 300 MiB of memory (--worker-memory)"}


def test_a_decoder_that_writes_is_stopped(tmp_path, engine, monkeypatch):
    table = extract(tmp_path, engine, "write", monkeypatch)
    assert reasons(table) == {"file too large"}
    assert (tmp_path / "written").stat().st_size <= sandbox.FILE_BYTES


def test_a_decoder_that_crashes_leaves_no_core(tmp_path, engine, monkeypatch):
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    table = extract(tmp_path, engine, "core", monkeypatch)
    assert reasons(table) == {"the decoding process died (SIGABRT), twice"}
    assert sorted(os.listdir(tmp_path)) == ["honest", "in", "out"]


def test_max_pixels_is_kept_and_images_may_be_tried_again_under_another(
    tmp_path, engine, monkeypatch
):
    content = saved(photograph(200, 100), "PNG")
    table = extract(tmp_path, engine, "large", monkeypatch, content, max_pixels=19_999)
    assert reasons(table) == {"200x100 is more than the limit of 19999 pixels"}
    again = {"batch_size": 16, "max_pixels": 20_000, "workers": 1}
    run(make_job(tmp_path / "in", tmp_path / "out", retry_failed=True, **again), engine)
    assert reasons(index(tmp_path / "out")) == set()
    (part,) = parts(tmp_path / "out")
    made = json.loads((part / "manifest.json").read_text())["made"]
    assert made["limits"] == {"max_pixels": 20_000, "seconds": 30.0, "memory": 2048}


# One process, and the most memory that it had


def outcomes_of(items: list[Item], preset: str, limits: Limits) -> tuple[list, int, int]:
    """What one process makes of them; its memory at the start, and the most that it had, bytes."""
    pool = workers.Workers(1, preset, 8, limits=limits)
    try:
        (outcome,) = pool.decode(items[:1], lambda: False)
        pids = pool.pids
        status = Path(f"/proc/{pids[0]}/status")
        start = _kilobytes(status, "VmHWM")
        found = [outcome, *pool.decode(items[1:], lambda: False)]
        assert pool.pids == pids, "it died"
        return found, start, _kilobytes(status, "VmHWM")
    finally:
        pool.close()


def _kilobytes(status: Path, name: str) -> int:
    return int(status.read_text().split(f"{name}:")[1].split()[0]) << 10


def items_of(root: Path, contents: dict[str, bytes]) -> list[Item]:
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return [Item(name, str(root / name)) for name in contents]


@pytest.mark.parametrize("preset", images.PRESETS)
def test_memory_under_attack_stays_below_the_limit(tmp_path, monkeypatch, preset):
    """And what an attack leaves behind is too little to fail what follows."""
    monkeypatch.setattr(workers, "work", attacked_work)
    honest, large = saved(photograph(), "PNG"), bombs.png(3600, 3600)  # eval takes 200 MiB
    names = {"a": honest, "eat": honest, "b": honest, "crumbs": honest, "c": large, "d": honest}
    found, start, most = outcomes_of(items_of(tmp_path, names), preset, Limits(memory=300))
    wanting = "needs more than 300 MiB of memory (--worker-memory)"
    assert [outcome.reason for outcome in found] == [None, wanting, None, wanting, None, None]
    assert found[4].width == 3600
    assert start + 200 * MIB < most < start + 320 * MIB


BOMBS = {
    "j2k precincts": bombs.j2k(2000, 2000, precinct=4),
    "webp canvas": bombs.webp(16_384, 16_384),
    "jpeg scans": bombs.jpeg(7000, 7000, scans=30_000),
    "plain ppm": b"P3 100 100 255\n" + b"#\n" * 1_000_000,
    "png too wide": bombs.png(20_000_000, 2),
    "tiff tile": bombs.tiff_of(9, 9, tile=[16_384, 16_384]),
}


@pytest.mark.parametrize("preset", images.PRESETS)
def test_bombs_cost_a_decoding_process_next_to_nothing(tmp_path, preset):
    honest = saved(photograph(), "PNG")
    files = {f"{place}-{name}": bomb for place, (name, bomb) in enumerate(BOMBS.items())}
    mixed = {"first": honest}
    for name, bomb in files.items():
        mixed |= {name: bomb, f"{name}-then": honest}
    found, start, most = outcomes_of(items_of(tmp_path, mixed), preset, Limits())
    assert [outcome.reason is None for outcome in found[::2]] == [True] * (1 + len(files))
    assert all(outcome.reason for outcome in found[1::2])
    assert most < start + 64 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("preset", images.PRESETS)
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("WEBP", {"method": 0, "lossless": True}),
        ("AVIF", {"speed": 10, "subsampling": "4:4:4"}),
        ("JPEG2000", {}),
        ("PNG", {"compress_level": 1}),
    ],
)
def test_the_default_memory_is_enough_for_the_largest_pictures(tmp_path, format, options, preset):
    """In proportion: the limits of 20 megapixels, as those of 50 take gigabytes to test."""
    pixels = 20_000_000
    picture = Image.new("RGBA", (5000, pixels // 5000), (10, 20, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(picture, format, exif=exif, **options)
    limits = Limits(pixels, memory=sandbox.BYTES_A_PIXEL * pixels // MIB)
    items = items_of(tmp_path, {"a": saved(photograph(), "PNG"), "large": data})
    (_, outcome), _, _ = outcomes_of(items, preset, limits)
    assert outcome.reason is None


def test_the_default_memory_grows_with_the_pixels():
    assert sandbox.memory_for(images.MAX_PIXELS) == 2048
    assert sandbox.memory_for(1) == 2048
    assert sandbox.memory_for(200_000_000) == 40 * 200_000_000 // MIB


# What the sandbox sets

REPORT = """
import json, resource, sys
from PIL import AvifImagePlugin, GifImagePlugin, Image, ImageFile, PngImagePlugin
ImageFile.LOAD_TRUNCATED_IMAGES = True
Image.MAX_IMAGE_PIXELS = None
GifImagePlugin.LOADING_STRATEGY = GifImagePlugin.LoadingStrategy.RGB_ALWAYS
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 40
from stellar_fast.extract.work import sandbox
sandbox.enter(sandbox.Limits(max_pixels=1234, memory=100))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([
    resource.getrlimit(resource.RLIMIT_CORE),
    resource.getrlimit(resource.RLIMIT_FSIZE),
    resource.getrlimit(resource.RLIMIT_DATA)[1] - (int(status["VmData"].split()[0]) << 10),
    int(status["NoNewPrivs"]),
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, int(GifImagePlugin.LOADING_STRATEGY),
    PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY,
    AvifImagePlugin.DEFAULT_MAX_THREADS,
]))
"""


def test_the_sandbox_of_a_process(tmp_path):
    told = subprocess.run(
        [sys.executable, "-P", "-c", REPORT], capture_output=True, text=True, check=True
    ).stdout
    core, size, room, privileges, truncated, pixels, strategy, chunk, text, threads = json.loads(
        told
    )
    assert (core, size) == ([0, 0], [MIB, MIB])
    assert 90 * MIB < room < 110 * MIB
    assert privileges == 1
    assert (truncated, pixels, threads) == (False, 1234, 1)
    assert strategy == GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST
    assert (chunk, text) == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_limit_that_is_there_already_is_never_raised():
    script = """
import resource
from stellar_fast.extract.work import sandbox
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 2000))
sandbox.enter(sandbox.Limits())
print(resource.getrlimit(resource.RLIMIT_FSIZE))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.stdout == "(2000, 2000)\n", done.stderr


def test_time_is_kept_whatever_was_made_of_its_signal():
    script = """
import signal, time
signal.signal(signal.SIGALRM, lambda *arguments: None)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # before numpy starts threads
from stellar_fast.extract.work import sandbox
sandbox.enter(sandbox.Limits())
with sandbox.decoding_time(0.1):
    pass
time.sleep(0.5)
print("still here", flush=True)
with sandbox.decoding_time(0.1):
    time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("still here\n", -sandbox.TIME_IS_UP), done.stderr


def test_a_decoder_that_hangs_ends_though_the_process_that_started_it_is_gone(tmp_path):
    path = tmp_path / "in" / "mark-hang"
    script = f"""
from attacks import attacked_work
from stellar_fast.extract.work import sandbox, workers
from stellar_fast.extract.records import Item
workers.work = attacked_work
if __name__ == "__main__":
    pool = workers.Workers(1, "card", 8, limits=sandbox.Limits(seconds=3))
    print(pool.pids[0], flush=True)
    next(pool.decode([Item("mark-hang", {str(path)!r})], lambda: False))
"""
    path.parent.mkdir()
    path.write_bytes(saved(photograph(), "PNG"))
    (tmp_path / "script.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        while not (tmp_path / "marked").exists():
            assert parent.poll() is None
            time.sleep(0.1)
        parent.kill()
    gone, _ = psutil.wait_procs([worker], timeout=120)
    assert gone == [worker]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_pixels", 0),
        ("worker_memory", 0),
        ("decode_seconds", 0),
        ("decode_seconds", float("inf")),
        ("decode_seconds", float("nan")),
    ],
)
def test_limits_that_cannot_be_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')}.*{value}"):
        make_job(tmp_path, tmp_path / "out", **{name: value})


def test_the_limits_are_those_of_a_process_by_default(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(photograph(), "PNG"))
    assert make_job(tmp_path, tmp_path / "out").limits == Limits()
