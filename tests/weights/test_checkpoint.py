"""Weights files of every wrong kind are each one clear error, and the right ones are read whole."""

import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from stellar_fast.errors import CheckpointError, DownloadError
from stellar_fast.weights.checkpoint import check_tensors, read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in STATE.items()}


def written(path, content: bytes):
    path.write_bytes(content)
    return path


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.fixture
def safetensors(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_formats_are_read_whatever_their_suffix(tmp_path, suffix, dtype):
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    save_file(state, tmp_path / f"one.{suffix}")
    torch.save(state, tmp_path / f"two.{suffix}")
    torch.save(state, tmp_path / f"three.{suffix}", _use_new_zipfile_serialization=False)
    for name in ("one", "two", "three"):
        found = read_state(tmp_path / f"{name}.{suffix}")
        assert set(found) == set(state)
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_names_come_out_canonical(tmp_path):
    renamed = {"model.encoder.layers.3.attention.q_proj.weight": torch.ones(2, 2)}
    save_file(renamed, tmp_path / "m.safetensors")
    assert list(read_state(tmp_path / "m.safetensors")) == [
        "encoder.encoder.layer.3.attention.attention.query.weight"
    ]


def test_one_parameter_in_two_spellings_is_refused(tmp_path):
    both = {
        "encoder.layers.0.mlp.fc1.bias": torch.ones(2),
        "encoder.encoder.layer.0.intermediate.dense.bias": torch.zeros(2),
    }
    save_file(both, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*two spellings"):
        read_state(tmp_path / "m.safetensors")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DownloadError, match=r"gone\.safetensors.*no such file"):
        read_state(tmp_path / "gone.safetensors")
    with pytest.raises(DownloadError, match="is a folder"):
        read_state(tmp_path)
    for name in ("long" * 5000, "nul\0"):
        with pytest.raises(DownloadError, match="no such file"):
            read_state(tmp_path / name)


def test_the_remedy_for_a_damaged_file_names_what_a_link_leads_to(tmp_path):
    """As in the Hub's cache, which gives out a damaged file until the file itself is deleted."""
    blob = written(tmp_path / "blob", b"\0" * 100)
    (tmp_path / "m.safetensors").symlink_to(blob)
    with pytest.raises(CheckpointError, match=f"delete {blob} and download it again"):
        read_state(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="delete it and download it again"):
        read_state(blob)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML page"),
        (b"\n  <HTML><body>404", "HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 347930428\n",
            r"Git-LFS pointer to 347930428 bytes \(oid sha256:ab\).*git lfs pull",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", r"pointer to \? bytes \(oid \?\)"),
        (b"not weights at all, just text", "found 29 bytes that begin b'not weights"),
        (b'{"error": "Entry not found"}', "expected safetensors or a torch pickle"),
        (b"\x00" * 64, "expected safetensors"),
        (struct.pack("<Q", 10**12) + b"{", "expected safetensors"),
        (struct.pack("<Q", 20) + b'{"a": 1}' + b" " * 12, "header is damaged"),
        (struct.pack("<Q", 4) + b"{]  ", "header is damaged"),
        (struct.pack("<Q", 4) + b"[1] ", "expected safetensors"),
        (header('{"a": {"data_offsets": ["0", "8"]}}'), "header is damaged"),
        (header('{"a": {"data_offsets": [0, 8.5]}}') + b"\0" * 9, "damaged safetensors"),
        (header('{"a": {"data_offsets": [0]}}'), "header is damaged"),
        (header('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "header is damaged"),
        (b"PK\x03\x04" + b"\x00" * 40, "damaged or truncated torch pickle of 44 bytes"),
        (b"\x80\x02", "damaged or truncated torch pickle"),
    ],
)
def test_what_is_no_weights_file(tmp_path, content, message):
    path = written(tmp_path / "stellar-b16.safetensors", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def test_truncated_safetensors_give_both_sizes(safetensors):
    content = safetensors.read_bytes()
    for length in range(9, len(content), 7):
        safetensors.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"truncated, {length} bytes where"):
            read_state(safetensors)
    safetensors.write_bytes(content)
    assert set(read_state(safetensors)) == set(STATE)


def test_truncated_pickles(tmp_path):
    torch.save(STATE, tmp_path / "vq.bin")
    content = (tmp_path / "vq.bin").read_bytes()
    for length in range(4, len(content) - 1, 97):
        written(tmp_path / "vq.bin", content[:length])
        with pytest.raises(CheckpointError, match=r"vq\.bin: damaged or truncated"):
            read_state(tmp_path / "vq.bin")


def test_every_flipped_header_byte_is_an_error_or_a_readable_file(safetensors):
    content = bytearray(safetensors.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(header):
        mutated = bytearray(content)
        mutated[position] ^= 0x15
        safetensors.write_bytes(bytes(mutated))
        try:
            read_state(safetensors)
        except CheckpointError:
            refused += 1
    assert refused > header // 2


class _Evil:
    def __reduce__(self):
        return (open, ("evidence", "w"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": _Evil()}, tmp_path / "zip.bin")
    written(tmp_path / "plain.bin", pickle.dumps(_Evil(), protocol=2))
    for name in ("zip.bin", "plain.bin"):
        with pytest.raises(CheckpointError, match=f"{name}"):
            read_state(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"was not run.*safetensors"):
        read_state(tmp_path / "zip.bin")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "found a list"),
        (torch.ones(2), "found a Tensor"),
        ({"state_dict": STATE, "epoch": 3}, "state_dict, epoch; if 'state_dict' is the state dict"),
        ({"a": torch.ones(1), "step": 5}, "other entries: step"),
        ({1: torch.ones(1)}, "other entries: 1"),
        ({"a": torch.ones(1), "s": torch.eye(2).to_sparse()}, "dense tensor.*other entries: s$"),
        ({"a": torch.ones(1), "m": torch.ones(2, device="meta")}, "other entries: m$"),
    ],
)
def test_a_pickle_that_is_no_plain_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "train.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / "train.ckpt")


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
def test_a_torchscript_archive_is_called_by_its_name(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointError, match=r"m\.pt.*TorchScript archive.*state_dict"):
        read_state(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(tmp_path):
    rows = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"a": torch.ones(1), "rows": rows}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"other entries: rows$"):
        read_state(tmp_path / "m.pt")


def test_parameters_come_without_gradients(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "m.pt")
    found = read_state(tmp_path / "m.pt")["a"]
    assert type(found) is torch.Tensor and not found.requires_grad


def test_tensors_are_checked_by_name_and_shape():
    check_tensors(STATE, SHAPES, where="x")
    with pytest.raises(CheckpointError, match=r"m: 3 tensors expected; 1 missing: c\. "):
        check_tensors(STATE, SHAPES | {"c": (1,)}, where="m")
    with pytest.raises(CheckpointError, match=r"a\.weight \(2, 3\) instead of \(3, 2\)"):
        check_tensors(STATE, SHAPES | {"a.weight": (3, 2)}, where="m")
    with pytest.raises(CheckpointError, match=r"1 unknown: b\.bias"):
        check_tensors(STATE, {"a.weight": (2, 3)}, where="m")
    check_tensors(STATE, {"a.weight": (2, 3)}, where="m", ignored=["b.bias"])


def test_many_wrong_names_are_counted():
    expected = {f"t{index}": (1,) for index in range(9)}
    with pytest.raises(CheckpointError, match="9 missing: t0, t1, t2, t3, t4 and 4 more"):
        check_tensors({}, expected, where="m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(value):
    state = {"a.weight": STATE["a.weight"].clone(), "b.bias": STATE["b.bias"]}
    state["a.weight"][1, 1] = value
    with pytest.raises(CheckpointError, match=r"m: a\.weight holds NaN or infinity"):
        check_tensors(state, SHAPES, where="m")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_must_be_floats_of_16_bits_or_more(dtype):
    state = STATE | {"b.bias": torch.ones(4).to(dtype)}
    with pytest.raises(CheckpointError, match=f"b.bias must be floating point of 16.*{dtype}"):
        check_tensors(state, SHAPES, where="m")
