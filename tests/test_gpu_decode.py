"""JPEG by torchcodec: the same files, the same rules, and pixels next to Pillow's."""

import struct
import sys
import types
from io import BytesIO

import numpy as np
import pytest
import torch
from mutants import mutant, originals
from pictures import photograph, saved
from PIL import Image
from test_fuzz_images import scan_bomb

from stellar_fast import gpu_decode, images
from stellar_fast.errors import ImageError, MissingExtraError, StellarError
from stellar_fast.jpeg import bare


def with_orientation(orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(photograph(), "JPEG", exif=exif, **options)


def rgb_components(named: bool, adobe: bool) -> bytes:
    """A JPEG whose components are red, green and blue, by their names, Adobe's word or both."""
    data = saved(photograph(), "JPEG", keep_rgb=True, quality=95)
    marked = data.index(b"\xff\xee")
    segment = data[marked : marked + 16]
    assert segment[4:9] == b"Adobe" and segment[-1] == 0
    if not adobe:
        data = data.replace(segment, b"")
    if not named:
        frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
        renamed = bytearray(data)
        for number in range(3):
            for at in (frame + 10 + 3 * number, scan + 5 + 2 * number):
                assert renamed[at] == b"RGB"[number]
                renamed[at] = number + 1
        data = bytes(renamed)
    return data


PLAIN = {
    "baseline": saved(photograph(), "JPEG"),
    "no subsampling": saved(photograph(), "JPEG", quality=97, subsampling=0),
    "progressive": saved(photograph(), "JPEG", progressive=True),
    "grey": saved(photograph().convert("L"), "JPEG"),
    "odd sides": saved(photograph(37, 23), "JPEG", restart_marker_rows=1),
    **{f"orientation {number}": with_orientation(number) for number in range(1, 9)},
    "orientation 9": with_orientation(9),
    "metadata": saved(photograph(), "JPEG", comment=b"\xff\xd9" * 9, icc_profile=b"\xff\xd9" * 99),
    "trailer": saved(photograph(), "JPEG") + b"\xff\xda\0\2" * 500 + bytes(99),
}
OTHERS = {
    "cmyk": saved(photograph().convert("CMYK"), "JPEG"),
    "rgb by both": rgb_components(named=True, adobe=True),
    "rgb by names": rgb_components(named=True, adobe=False),
    "rgb by Adobe": rgb_components(named=False, adobe=True),
    "png": saved(photograph(), "PNG"),
    "transparent": saved(photograph().quantize(16), "PNG", transparency=3),
    "no end": saved(photograph(), "JPEG")[:-2],
}


class Recorder:
    """torchcodec as Pillow would play it: what it was handed, and what it refuses."""

    def __init__(self) -> None:
        self.calls: list[list[bytes]] = []
        self.refused: set[bytes] = set()

    def decode_jpeg(self, files: list[bytes], *, mode: str, device: torch.device) -> list:
        assert mode == "RGB"
        self.calls.append(files)
        if self.refused & set(files):
            raise RuntimeError("nvJPEG failed")
        try:
            pictures = [np.array(Image.open(BytesIO(file)).convert("RGB")) for file in files]
        except Exception as error:
            raise RuntimeError(str(error)) from error
        return [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in pictures]


@pytest.fixture
def played(monkeypatch) -> Recorder:
    recorder = Recorder()
    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    decoders.decode_jpeg = recorder.decode_jpeg
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    return recorder


def by_pillow(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(images.decode(data))).permute(2, 0, 1)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_go_to_torchcodec_without_their_metadata(name, played):
    (found,) = gpu_decode.decode_batch([PLAIN[name]], "cpu")
    assert torch.equal(found, by_pillow(PLAIN[name]))
    ((handed,),) = played.calls
    assert not Image.open(BytesIO(handed)).getexif()
    assert handed.endswith(b"\xff\xd9")
    assert b"ICC_PROFILE" not in handed


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_file_is_pillows(name, played):
    try:
        expected = by_pillow(OTHERS[name])
    except ImageError as error:
        expected = error
    (found,) = gpu_decode.decode_batch([OTHERS[name]], "cpu")
    assert played.calls == []
    if isinstance(expected, ImageError):
        assert found.reason == expected.reason
    else:
        assert torch.equal(found, expected)


def test_the_order_is_kept_and_reasons_are_those_of_images(played, tmp_path):
    good = tmp_path / "good.jpg"
    good.write_bytes(PLAIN["baseline"])
    (tmp_path / "empty.jpg").write_bytes(b"")
    sources = [
        OTHERS["png"],
        tmp_path / "absent.jpg",
        good,
        b"no picture",
        tmp_path,
        scan_bomb(64, images.MAX_SCANS),
        tmp_path / "empty.jpg",
        PLAIN["progressive"],
        PLAIN["baseline"][:200],
    ]
    found = gpu_decode.decode_batch(sources, "cpu", max_pixels=5000)
    assert len(played.calls) == 1
    for source, result in zip(sources, found, strict=True):
        try:
            expected = torch.from_numpy(np.array(images.decode(source, max_pixels=5000)))
        except ImageError as error:
            assert (result.path, result.reason) == (error.path, error.reason)
        else:
            assert torch.equal(result, expected.permute(2, 0, 1))
    (error,) = gpu_decode.decode_batch([good], "cpu", max_pixels=100)
    assert error.reason == "40x24 is more than the limit of 100 pixels"
    assert gpu_decode.decode_batch([], "cpu") == []


def test_what_torchcodec_refuses_is_pillows_to_judge(played):
    files = [saved(photograph(seed=seed), "JPEG") for seed in range(7)]
    played.refused = {bare(files[2]), bare(files[6])}
    found = gpu_decode.decode_batch(files, "cpu")
    assert len(played.calls) > 1
    for file, result in zip(files, found, strict=True):
        assert torch.equal(result, by_pillow(file))


def test_out_of_memory_is_no_fault_of_a_file(played, monkeypatch):
    def fail(*arguments, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(sys.modules["torchcodec.decoders"], "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_decode.decode_batch([PLAIN["baseline"]] * 2, "cpu")


def test_mutants_come_to_the_same_end(played):
    """Pillow plays both parts, so every difference is one of the rules."""
    data = [mutant("JPEG", seed) for seed in range(150)]
    plain = 0
    for file in data:
        (found,) = gpu_decode.decode_batch([file], "cpu", max_pixels=1_000_000)
        plain += len(played.calls)
        played.calls.clear()
        try:
            expected = images.decode(file, max_pixels=1_000_000)
        except ImageError as error:
            assert found.reason == error.reason
        else:
            assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.array(expected)))
    assert 25 < plain < 150


@pytest.mark.parametrize("preset", images.PRESETS)
@pytest.mark.parametrize("size", [(500, 375), (60, 200), (224, 224), (1000, 301)])
def test_presets_are_next_to_those_of_images(preset, size):
    picture = photograph(*size)
    expected = images.apply_preset(picture, preset)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    found = gpu_decode.apply_preset(pixels, preset)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    most = (found.float() - expected.float()).abs().max().item()
    assert most <= (1 if preset == "card" else 1e-6)


def test_preset_errors():
    with pytest.raises(ValueError, match="unknown preset"):
        gpu_decode.apply_preset(torch.zeros((3, 9, 9), dtype=torch.uint8), "none")
    with pytest.raises(ImageError, match="1x300 is too long and narrow"):
        gpu_decode.apply_preset(torch.zeros((3, 300, 1), dtype=torch.uint8), "eval")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[gpu-decode\]"):
        gpu_decode.decode_batch([], "cpu")


def test_an_extra_built_for_another_torch(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchcodec":
                raise OSError("Could not load this library:\nlibtorchcodec_image.so")

    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(StellarError, match="cannot be loaded: Could not load this library: libt"):
        gpu_decode.decode_batch([], "cpu")


def test_bare_files():
    for name, data in PLAIN.items():
        coded = bare(data)
        assert bare(coded) == coded, name
        assert len(coded) <= len(data)
    assert bare(b"") is bare(saved(photograph(), "PNG")) is None
    assert bare(PLAIN["baseline"][:-2]) is bare(PLAIN["baseline"][:100]) is None
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe\0\x64\0\0\0\0\1"
    marked = PLAIN["baseline"][:2] + adobe + PLAIN["baseline"][2:]
    assert adobe in bare(marked)


# Parity with Pillow, where torchcodec can be loaded


def check_parity(device: str, worst: int, mean: float) -> None:
    """Every plain file, real photographs' sides and all originals of the fuzzer."""
    files = [*PLAIN.values(), *OTHERS.values(), *originals("JPEG")]
    files += [saved(photograph(801, 533, seed), "JPEG", quality=80 + seed) for seed in range(8)]
    found = gpu_decode.decode_batch(files, device)
    for file, result in zip(files, found, strict=True):
        try:
            expected = by_pillow(file)
        except ImageError as error:
            assert result.reason == error.reason
            continue
        assert result.device.type == device
        difference = (result.cpu().int() - expected.int()).abs()
        assert difference.max() <= worst
        assert difference.float().mean() <= mean


@pytest.fixture
def torchcodec():
    try:
        gpu_decode._torchcodec()
    except (MissingExtraError, StellarError) as error:
        pytest.skip(str(error))


def test_parity_on_the_cpu(torchcodec):
    check_parity("cpu", worst=0, mean=0.0)


def test_mutants_by_torchcodec(torchcodec):
    """The same verdict on every file; pixels may differ where the coded ones are damaged."""
    files = [mutant("JPEG", seed) for seed in range(1000, 1400)]
    for file, result in zip(files, gpu_decode.decode_batch(files, "cpu"), strict=True):
        try:
            expected = by_pillow(file)
        except ImageError:
            assert isinstance(result, ImageError)
        else:
            assert result.shape == expected.shape


@pytest.mark.gpu
def test_parity_on_the_gpu(torchcodec):
    """nvJPEG rounds otherwise and enlarges halved colours otherwise: mostly one or two of 255."""
    check_parity("cuda", worst=64, mean=2.0)
