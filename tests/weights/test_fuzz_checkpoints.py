"""Thousands of damaged weights files and configs: each a clear error, or the right result."""

import io
import json
import pickletools
import random
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import peak
from safetensors.torch import save_file
from tiny import BACKBONE, CONFIG, CPU, join, save_packed, split

from stellar_fast.config import BACKBONES, LARGEST
from stellar_fast.errors import CheckpointError, DownloadError
from stellar_fast.weights import checkpoint, saving
from stellar_fast.weights.manifest import read_model

# Of sizes of their own, so that no exchange of offsets goes unseen.
STATE = {f"part.{n}.weight": torch.arange(1.0, 1 + 3 * n).reshape(3, n) for n in (1, 2, 3, 5, 7)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in STATE.items()}
HOSTILE = [
    *(None, True, 0, 1, -1, 3.5, 1 << 31, 1 << 40, 1 << 63, 1 << 200, 1e-320, 1e308, float("nan")),
    *("", "x", "\0", "../x", "/etc/passwd", "F64", "F8_E4M3", "I64", "Block", "os", "\x1b[2J" * 50),
    *([], {}, [0, 0], [1 << 40], [[[[[]]]]], {"tensor": "encoder.patch"}, {"kind": "Path"}),
]
SECONDS = 60  # of the thread's own time for one file: no such file needs one
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
MEBIBYTES = 1500  # that all of them may add to the process

Attempt = Callable[[Path, random.Random], str]


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, inserted, taken out, repeated, or cut off."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place, size = draw.randrange(len(found) + 1), draw.choice((1, 1, 2, 8, 50))
        match draw.randrange(6):
            case 0 if place < len(found):
                found[place] ^= 1 << draw.randrange(8)
            case 1:
                found[place:place] = draw.randbytes(size)
            case 2:
                del found[place : place + size]
            case 3:
                found[place:place] = found[place : place + size]
            case 4 if place < len(found):
                found[place] = draw.choice(b'0123456789[]{},:"-.eE')
            case 5 if draw.random() < 0.2:
                del found[place:]
        if not found:
            break
    return bytes(found)


def json_changed(node: Any, draw: random.Random) -> Any:
    """A value of `node`, anywhere in it, replaced, removed, repeated or exchanged for another."""
    places: list[tuple[Any, Any]] = []

    def visit(parent: Any) -> None:
        keys = parent if isinstance(parent, dict) else range(len(parent))
        for key in keys:
            places.append((parent, key))
            if isinstance(parent[key], dict | list):
                visit(parent[key])

    visit(node)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        parent, key = draw.choice(places)
        other, twin = draw.choice(places)
        there = key in parent if isinstance(parent, dict) else key < len(parent)
        given = twin in other if isinstance(other, dict) else twin < len(other)
        if not there:
            continue
        match draw.randrange(5):
            case 0 | 1:
                parent[key] = draw.choice(HOSTILE)
            case 2:
                del parent[key]
            case 3 if given:
                parent[key] = json.loads(json.dumps(other[twin]))
            case 4 if isinstance(parent, dict):
                parent[draw.choice(("x", "extra\n", "kind", "fields"))] = parent[key]
            case 4:
                parent.append(parent[key])
    return node


def pickle_changed(content: bytes, draw: random.Random) -> bytes:
    """Opcodes taken out, repeated, moved, or hostile ones put between."""
    starts = [place for _, _, place in pickletools.genops(content)]
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    hostile = [
        *(b"cposix\nsystem\n", b"cbuiltins\neval\n", b"R", b"b", b"\x81", b"2", b"0", b"(", b"t"),
        *(b"\x85", b"\x86", b"}", b")", b"]", b"s", b"u", b"a", b"e", b"Q", b"N", b"\x88", b"."),
        *(b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"h\x00", b"h\x01"),
        *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"r\xff\xff\xff\xff", b")" + b"q\x00h\x00\x86" * 60),
        *(b"X\x04\x00\x00\x00evil", b"X\xff\xff\xff\x7fa", b"ctorch\nLongStorage\n"),
    ]
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(parts))
        match draw.randrange(4):
            case 0:
                parts.insert(place, draw.choice(hostile))
            case 1:
                parts[place] = draw.choice(hostile)
            case 2:
                parts.insert(place, draw.choice(parts))
            case 3 if len(parts) > 2:
                del parts[place]
    return b"".join(parts)


def read_and_checked(path: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.read_state(path)
    checkpoint.check_tensors(found, SHAPES, where=str(path))
    return found


def safetensors_header(path: Path, draw: random.Random) -> str:
    save_file(STATE, path, metadata={"format": "pt"})
    header, values = split(path)
    if draw.random() < 0.5:
        raw = bytes_changed(json.dumps(header).encode(), draw)
    else:
        raw = json.dumps(json_changed(header, draw)).encode()
    join(path, raw, values)
    if draw.random() < 0.1:
        content = bytearray(path.read_bytes())
        content[:8] = struct.pack("<Q", draw.choice((0, 1, len(raw) + 1, 1 << 40, (1 << 64) - 1)))
        path.write_bytes(content)
    found = read_and_checked(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    return "equal"


PACKED: dict[str, bytes] = {}


def packed_header(path: Path, draw: random.Random) -> str:
    precision = draw.choice(("fp32", "fp8"))
    if precision not in PACKED:
        folder = path.parent / precision
        PACKED[precision] = save_packed(folder, precision, decoder=precision == "fp8").read_bytes()
    path.write_bytes(PACKED[precision])
    # Copies: what is mapped into memory changes with the file below.
    original = {name: tensor.clone() for name, tensor in checkpoint.read_state(path).items()}
    header, values = split(path)
    text = header["__metadata__"][saving.METADATA]
    match draw.randrange(3):
        case 0:
            changed = bytes_changed(text.encode(), draw).decode("utf-8", "replace")
            header["__metadata__"][saving.METADATA] = changed
        case 1:
            changed = json.dumps(json_changed(json.loads(text), draw))
            header["__metadata__"][saving.METADATA] = changed
        case 2:
            json_changed(header, draw)
    join(path, json.dumps(header), values)
    if saving.saved_precision(path) is None:
        checkpoint.read_state(path)  # a file of another kind, or an error
        return "no packed file"
    encode, decode = saving.read(path, CONFIG, CPU)
    found: dict[str, torch.Tensor] = {}
    saving._flatten(encode, "encoder", found)
    saving._flatten(decode, "decoder", found)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
    same = all(torch.equal(found[name].float(), original[name].float()) for name in found)
    # Tensors of one shape may have been exchanged, which makes another right file.
    return "equal" if same else "other values"


def config_json(path: Path, draw: random.Random) -> str:
    fields = {name: getattr(BACKBONE, name) for name in BACKBONE.__dataclass_fields__}
    entry = {
        "weights": "tiny.safetensors",
        "num_sparse_tokens": 2,
        "num_decoder_layers": 1,
        "spatial_temp": 0.06,
        "backbone": draw.choice([fields, "facebook/vit-mae-huge"]),
    }
    content = {"models": {"tiny": entry, "other": 3}}
    if draw.random() < 0.5:
        raw = bytes_changed(json.dumps(content).encode(), draw)
    else:
        raw = json.dumps(json_changed(content, draw)).encode()
    path.write_bytes(raw)
    config = read_model(path, "tiny")[0]
    for name, most in LARGEST.items():
        owner = config if hasattr(config, name) else config.backbone
        assert 1 <= getattr(owner, name) <= most
    assert (path.parent / config.weights).resolve().is_relative_to(path.parent.resolve())
    return "equal" if config.backbone in (BACKBONE, *BACKBONES.values()) else "other values"


def torch_pickle(path: Path, draw: random.Random) -> str:
    zipped = draw.random() < 0.6
    content = io.BytesIO()
    torch.save(STATE, content, _use_new_zipfile_serialization=zipped)
    if draw.random() < 0.3 or not zipped:
        path.write_bytes(bytes_changed(content.getvalue(), draw))
    else:
        change = pickle_changed if draw.random() < 0.6 else bytes_changed
        compression = draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
        with (
            zipfile.ZipFile(content) as source,
            zipfile.ZipFile(path, "w", compression=compression) as target,
        ):
            for name in source.namelist():
                member = source.read(name)
                if name.endswith("data.pkl"):
                    member = change(member, draw)
                target.writestr(name, member)
    found = read_and_checked(path)
    assert all(type(tensor) is torch.Tensor for tensor in found.values())
    same = all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    return "equal" if same else "other values"


KINDS: dict[str, Attempt] = {
    attempt.__name__: attempt
    for attempt in (packed_header, safetensors_header, config_json, torch_pickle)
}


def outcomes(kind: str, folder: Path, seeds: range) -> Counter[str]:
    """What became of each seed's file; asserts what must not be."""
    counts: Counter[str] = Counter()
    path = folder / "tiny.safetensors"
    started: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple) -> None:
        if watching[0] and event in FORBIDDEN:
            started.append(event)

    before = peak()
    sys.addaudithook(watch)
    for seed in seeds:
        start = time.thread_time()
        try:
            outcome = KINDS[kind](path, random.Random(seed))
        except (CheckpointError, DownloadError, ValueError) as error:
            outcome = type(error).__name__
            # A ValueError beside them is a model of another name.
            assert outcome != "ValueError" or "unknown model" in str(error), (kind, seed, error)
            assert str(error) and len(str(error)) < 3000, (kind, seed, str(error)[:200])
        assert time.thread_time() - start < SECONDS, (kind, seed)
        assert not started, (kind, seed, started)
        counts[outcome] += 1
    watching[0] = False
    grown = (peak() - before) / 2**20
    assert grown < MEBIBYTES, f"{grown:.0f} MiB more"
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_errors_or_right(kind, tmp_path):
    counts = outcomes(kind, tmp_path, range(150))
    assert counts["CheckpointError"] > 30, counts


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_by_the_thousand(kind, tmp_path):
    counts = outcomes(kind, tmp_path, range(1000, 3500))
    print(kind, dict(counts))
    assert counts["CheckpointError"] > 500, counts
