"""`source.locate` and `read_model` on local folders, good and bad."""

import json
import os
from pathlib import Path

import pytest
from hub_server import ENTRY, files, index

from stellar_fast.config import BACKBONES, ModelConfig
from stellar_fast.errors import CheckpointError, DownloadError
from stellar_fast.weights import source
from stellar_fast.weights.manifest import read_model

CONFIG = ModelConfig("small", BACKBONES["facebook/vit-mae-base"], 8, 2, 0.1, "small.safetensors")


@pytest.fixture
def folder(tmp_path):
    for name, content in files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_local_folder(folder, monkeypatch):
    expected = source.Located(CONFIG, folder / "small.safetensors")
    assert (
        source.locate("small", repo=folder) == source.locate("small", repo=str(folder)) == expected
    )
    monkeypatch.setenv("HOME", str(folder.parent))
    assert source.locate("small", repo=f"~/{folder.name}") == expected
    monkeypatch.chdir(folder.parent)
    for repo in (folder.name, f"./{folder.name}", f"../{folder.parent.name}/{folder.name}"):
        assert source.locate("small", repo=repo).weights.samefile(expected.weights)


def test_local_folder_without_its_files(folder):
    (folder / "small.safetensors").rename(folder / "smal.safetensors")
    with pytest.raises(DownloadError, match=r"small\.safetensors.*config\.json, smal\.safeten"):
        source.locate("small", repo=folder)
    (folder / "config.json").unlink()
    with pytest.raises(DownloadError, match=r"config\.json is missing.*has: smal\.safetensors"):
        source.locate("small", repo=folder)
    with pytest.raises(DownloadError, match="is a file; give the folder"):
        source.locate("small", repo=folder / "smal.safetensors")


@pytest.mark.parametrize("repo", ["/absent/x", "./x", "~/absent-x", "a/b/c", "absent/", "a\\b"])
def test_a_path_where_nothing_is(repo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="is a path, and there is no such folder"):
        source.locate("small", repo=repo)
    with pytest.raises(DownloadError, match="is a path, and there is no such folder"):
        source.locate("small", repo=Path("absent"))


def test_unknown_name_in_a_folder(folder):
    with pytest.raises(ValueError, match=r"'stellar-b16'.*has: small") as caught:
        source.locate("stellar-b16", repo=folder)
    assert not isinstance(caught.value, CheckpointError)


def test_backbone_objects_and_no_temperature(folder):
    backbone = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 100,
        "patch_size": 16,
    }
    content = index(backbone=backbone, spatial_temp=None, weights="deep/er.bin", note="ours")
    (folder / "config.json").write_bytes(content)
    config = read_model(folder / "config.json", "small")[0]
    assert config.backbone.hidden_size == 64 and config.backbone.image_size == 224
    assert config.spatial_temp is None and config.weights == "deep/er.bin"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["is not JSON", "b''"]),
        (b'{"models": {', ["is not JSON", "delete"]),
        (b"\xff\xfe\xff", ["is not JSON"]),
        (b"[" * 100_000, ["is not JSON"]),
        (index(spatial_temp=float("nan")), ["is not JSON", "NaN"]),
        (index(spatial_temp=float("inf")), ["is not JSON", "Infinity"]),
        (b"[1]", ["must be a JSON object", "[1]"]),
        (b'{"model": 1}', ["no field 'models'", "'model'"]),
        (b'{"models": ["small"]}', ["'models' must be an object", '["small"]']),
        (b'{"models": {"small": 3}}', ["models.small must be a JSON object", "3"]),
        *[
            (
                json.dumps({"models": {"small": {k: v for k, v in ENTRY.items() if k != field}}}),
                [f"models.small has no field {field!r}"],
            )
            for field in ENTRY
        ],
        *[
            (index(weights=path), ["models.small.weights must be the path of a file inside"])
            for path in (
                "/etc/passwd",
                "../x",
                "a/../../x",
                "",
                ".",
                "C:\\x",
                "..\\x",
                "\\x",
                3,
                None,
            )
        ],
        (index(spatial_temp="0.06"), ["spatial_temp must be", '"0.06"']),
        (index(spatial_temp=True), ["spatial_temp must be", "true"]),
        (index(spatial_temp=-1), ["spatial_temp must be positive"]),
        (index(spatial_temp=10**400), ["spatial_temp must be positive"]),
        (index().replace(b"0.1", b"1e999"), ["spatial_temp must be positive", "inf"]),
        (b'{"models": {}, "models": {}}', ["is not JSON", "a key is there twice"]),
        (b" " * 10_000_001, ["more than 10000000 bytes"]),
        (b'{"models": ' + b"[" * 900 + b"]" * 900 + b"}", ["'models' must be an object"]),
        (index(num_sparse_tokens="16"), ["num_sparse_tokens must be a positive integer, got '16'"]),
        (index(num_sparse_tokens=True), ["num_sparse_tokens must be a positive integer"]),
        (index(num_decoder_layers=2.0), ["num_decoder_layers must be a positive integer"]),
        (index(backbone="vit-base"), ["models.small: unknown backbone 'vit-base'"]),
        (index(backbone=7), ["backbone must be a name or an object"]),
        (index(backbone={"hidden_size": 64}), ["missing fields", "patch_size"]),
    ],
)
def test_configs_that_are_not_in_the_published_layout(folder, content, parts):
    path = folder / "config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError) as caught:
        source.locate("small", repo=folder)
    for part in [os.fspath(path), *parts]:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 400 + len(os.fspath(path)) * 2
