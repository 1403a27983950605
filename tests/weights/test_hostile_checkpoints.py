"""Weights files made to harm the machine that reads them: little time, little memory, one error."""

import collections
import io
import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import ENTRY, HubServer, files, index, locate_in_process
from safetensors.torch import save_file

import stellar_fast
from stellar_fast.config import LARGEST, MODELS, MOST_PARAMETERS, BackboneConfig
from stellar_fast.errors import CheckpointError, DownloadError
from stellar_fast.weights import names, source
from stellar_fast.weights.checkpoint import read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4)}


def saved(path: Path, content: object = None, **options) -> Path:
    torch.save(STATE if content is None else content, path, **options)
    return path


def rewritten(path: Path, change: Callable[[dict[str, bytes]], object], **options) -> Path:
    """Changes the members of a zip archive, whose checksums are right again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def pickled(path: Path, content: bytes) -> Path:
    """A file of `torch.save` whose pickle is `content`."""
    saved(path)
    return rewritten(path, lambda members: members.update({f"{path.stem}/data.pkl": content}))


def refused(path: Path, *parts: str) -> None:
    start = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert time.thread_time() - start < 30  # what these files ask for would take hours
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1500 + len(str(path))


def nested_tuple(levels: int) -> bytes:
    """Opcodes of ((((), ()), ((), ())), ...): twice as many tuples a level, few bytes."""
    level = b"q\x00h\x00\x86"
    return b")" + level * levels


KEY, OTHER = "a key of type tuple", "other entries: a"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"}" + nested_tuple(60) + b"K\x01s.", KEY),
        (b"}(" + nested_tuple(60) + b"K\x01u.", KEY),
        (b"}" + nested_tuple(60) + b"\x85K\x01s.", KEY),
        (b"ccollections\nOrderedDict\n)R" + nested_tuple(60) + b"K\x01s.", KEY),
        (b"ccollections\nCounter\n" + nested_tuple(60) + b"\x85R.", "found a NoneType"),
        (nested_tuple(60) + b".", "found a tuple"),
        (b"}X\x01\x00\x00\x00a" + nested_tuple(60) + b"s.", OTHER),
    ],
)
def test_nested_tuples_are_neither_hashed_nor_printed(tmp_path, body, reason):
    refused(pickled(tmp_path / "m.pt", b"\x80\x02" + body), reason)
    (tmp_path / "old.pt").write_bytes(legacy(b"\x80\x02" + body))
    refused(tmp_path / "old.pt", reason)


def legacy(state: bytes, *, keys: object = (), values: bytes = b"") -> bytes:
    """A file in the format before torch 1.6."""
    sys_info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, sys_info)]
    return b"".join([*parts, state, pickle.dumps(list(keys), 2), values])


class Tensor:
    """Pickles as a tensor of float32 that `numel` values in storage "0" hold."""

    def __init__(self, numel, shape, stride, offset=0, key="0") -> None:
        self.storage, self.view = (numel, key), (offset, shape, stride)

    def __reduce__(self):
        import torch._utils

        rest = (False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, (Storage(*self.storage), *self.view, *rest)


class Storage:
    def __init__(self, numel, key) -> None:
        self.identity = ("storage", torch.FloatStorage, key, "cpu", numel)


class Pickler(pickle.Pickler):
    def persistent_id(self, found):
        return found.identity if isinstance(found, Storage) else None


def of_tensor(*arguments, **keywords) -> bytes:
    content = io.BytesIO()
    Pickler(content, 2).dump({"a": Tensor(*arguments, **keywords)})
    return content.getvalue()


def test_the_forged_tensors_below_are_read_where_they_are_honest(tmp_path):
    path = pickled(tmp_path / "m.pt", of_tensor(6, (2, 2), (3, 1), 1))
    assert read_state(path)["a"].tolist() == [[1, 2], [4, 5]]
    values = torch.arange(6.0).numpy().tobytes()
    old = legacy(of_tensor(6, (3,), (2,)), keys="0", values=struct.pack("<q", 6) + values)
    (tmp_path / "old.pt").write_bytes(old)
    assert read_state(tmp_path / "old.pt")["a"].tolist() == [0, 2, 4]


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((6, (HUGE,), (0,)), "beyond its storage"),
        ((6, (HUGE, HUGE), (0, 0)), "beyond its storage"),
        ((6, (HUGE,), (1,)), "beyond its storage"),
        ((6, (7,), (1,)), "beyond its storage"),
        ((6, (2, 3), (4, 1)), "beyond its storage"),
        ((6, (6,), (1,), 1), "beyond its storage"),
        ((6, (0,), (1,), HUGE), "beyond its storage"),
        ((6, (2,), (-1,), 1), "no shape"),
        ((6, (-2,), (1,)), "no shape"),
        ((6, (1 << 2000,), (1,)), "no shape"),
        ((6, (1,) * 9, (1,) * 9), "no shape"),
        ((6, (2, 3), (1,)), "no shape"),
        ((6, [6], [1]), "no shape"),
        ((6, (6.0,), (1,)), "no shape"),
        ((6, (True,), (1,)), "no shape"),
        ((6, (6,), (1,), -1), "without a storage"),
        ((7, (6,), (1,)), "another length"),
        ((5, (5,), (1,)), "another length"),
        ((HUGE, (6,), (1,)), "another length"),
        ((-1, (0,), (1,)), "no length"),
        ((6.0, (6,), (1,)), "no length"),
        ((6, (6,), (1,), 0, "../version"), "damaged"),
        ((6, (6,), (1,), 0, "7"), "damaged"),
    ],
)
def test_tensors_that_reach_beyond_the_file(tmp_path, arguments, reason):
    refused(pickled(tmp_path / "m.pt", of_tensor(*arguments)), reason)
    values = struct.pack("<q", 6) + bytes(24)
    (tmp_path / "old.pt").write_bytes(legacy(of_tensor(*arguments), keys="0", values=values))
    refused(tmp_path / "old.pt")


def test_old_files_state_no_more_than_they_have(tmp_path):
    path = tmp_path / "old.pt"
    for numel, stated in ((HUGE, HUGE), (HUGE, 6), (6, HUGE), (6, 7)):
        values = struct.pack("<q", stated) + bytes(24)
        path.write_bytes(legacy(of_tensor(numel, (6,), (1,)), keys="0", values=values))
        refused(path, "storage")
    for keys in ({"0": 1}, [0], [["0"]], ["0", "0"], [], ["1"]):
        values = struct.pack("<q", 6) + bytes(24)
        content = pickle.dumps(keys, 2)
        start = legacy(of_tensor(6, (6,), (1,)))[: -len(pickle.dumps([], 2))]
        path.write_bytes(start + content + values)
        refused(path)


def test_compressed_members_are_not_unpacked(tmp_path):
    path = saved(tmp_path / "m.pt", {"a": torch.zeros(1 << 22)})
    rewritten(path, lambda members: None, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "compressed members")


def test_members_that_share_their_bytes(tmp_path):
    path = saved(tmp_path / "m.pt", {"a": torch.zeros(1 << 18)})
    with zipfile.ZipFile(path, "a") as archive:
        (first,) = (info for info in archive.infolist() if info.filename == "m/data/0")
        for copy in range(1, 300):
            twin = zipfile.ZipInfo(f"m/data/{copy}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, field, getattr(first, field))
            archive.filelist.append(twin)
        archive._didModify = True
    refused(path, "larger than the file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_pickles_in_one_archive(tmp_path):
    path = saved(tmp_path / "m.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
    refused(path, "one name")
    path = saved(tmp_path / "n.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    refused(path, "2 members data.pkl")


def test_a_damaged_value_is_seen_by_its_checksum(tmp_path):
    path = saved(tmp_path / "m.pt", {"a": torch.full((1000,), 0.5)})
    content = path.read_bytes()
    place = content.index(b"\0\0\0\x3f" * 1000) + 400
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    refused(path, "CRC")


def test_long_pickles_and_long_directories(tmp_path):
    refused(pickled(tmp_path / "m.pt", b"\x80\x02" + b"}0" * 1_000_000 + b"}."), "2000000 bytes")
    (tmp_path / "old.pt").write_bytes(legacy(b"\x80\x02" + b")" * 3_000_000 + b"."))
    refused(tmp_path / "old.pt")
    path = saved(tmp_path / "d.pt")
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(200):
            archive.writestr(f"{number:0>60000}", b"")
    refused(path, "in one piece")


@pytest.mark.parametrize(
    "body",
    [
        b"cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
        b"cos\npath.join\n)R.",
        b"ctorch\nload\n.",
        b"ctorch.nn\nLinear\n)\x81.",
        b"\x8c\x05posix\x8c\x06system\x93.",
        b"(X\x02\x00\x00\x00lsios\nsystem\n.",
        b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b\x85R.",
        b"}X\x01\x00\x00\x00a2s.",
        b"\x82\x01.",
        b"I1\n.",
        b"S'\\q'\n.",
        b"c\\q\n\\z\n.",
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_no_state_dict_needs_is_not_done(tmp_path, body):
    refused(pickled(tmp_path / "m.pt", b"\x80\x02" + body), "was not run")


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b".",
            b"}",
            b"0.",
            b"h\x05.",
            b"t.",
            b"u.",
            b"}(K\x01u.",
            b"Q.",
            b"R.",
            b"s.",
            b"b.",
        ),
        *(
            b"]}K\x01K\x02ss.",
            b"}}e.",
            b"\x85\x85\x85.",
            b"X\xff\xff\xff\xffa.",
            b"X\x01\0\0\0\xff.",
        ),
        b"}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.",
        b"\x8a\xff" + b"\x7f" * 255 + b".",
        b"(" * 100_000 + b".",
        b"]" + b"\x85" * 200_000 + b".",
    ],
)
def test_pickles_that_make_no_sense(tmp_path, body):
    refused(pickled(tmp_path / "m.pt", b"\x80\x02" + body))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_honest_pickles_of_every_protocol(tmp_path, protocol, zipped):
    shared = torch.arange(12.0).reshape(3, 4)
    state = collections.OrderedDict(
        {**STATE, "t": shared.T, "part": shared[1:, ::2], "parameter": torch.nn.Parameter(shared)}
    )
    state |= {"none": torch.zeros(0, 5), "scalar": torch.tensor(3.0), "steps": torch.tensor(7)}
    module = torch.nn.BatchNorm2d(3).state_dict()
    run = {
        "state_dict": state | module,
        "optimizer": {"state": {0: {"step": 3.0}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "milestones": collections.Counter({7: 1}),
        "shape": torch.Size([1]),
        "where": torch.device("cpu"),
        "kind": torch.bfloat16,
    }
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    path = saved(tmp_path / "run.pt", run, **options)
    found = read_state(path, inside="state_dict")
    assert found.keys() == run["state_dict"].keys()
    for name, tensor in run["state_dict"].items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.uint8, torch.bool]
)
def test_every_dtype_of_a_pickle(tmp_path, dtype):
    values = torch.arange(1, 300).to(dtype)
    assert torch.equal(read_state(saved(tmp_path / "m.pt", {"a": values}))["a"], values)


def test_headers_beyond_ten_megabytes(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(STATE, path, metadata={"padding": "x" * 17_000_000})
    refused(path, "at most 10000000")
    save_file(STATE, path, metadata={"padding": "x" * 9_000_000})
    assert read_state(path).keys() == STATE.keys()


def test_a_name_twice_in_a_header(tmp_path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(path, "a key is there twice")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_names_in_messages_are_short_and_printable(tmp_path, suffix):
    state = {f"\x1b]0;x\x07\n\u202e{number}" * 20_000: torch.ones(1) for number in range(7)}
    path = tmp_path / f"small.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    (tmp_path / "config.json").write_bytes(index(weights=path.name))
    with pytest.raises(CheckpointError, match="7 unknown") as caught:
        stellar_fast.load("small", repo=tmp_path, device="cpu")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 4000


BACKBONE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "image_size": 224,
}


@pytest.mark.parametrize("field", LARGEST)
@pytest.mark.parametrize("factor", [None, 10**6, 10**4000])
def test_geometries_are_bounded(tmp_path, field, factor):
    value = LARGEST[field] + 1 if factor is None else LARGEST[field] * factor
    changes = {"backbone": BACKBONE | {field: value}} if field in BACKBONE else {field: value}
    (tmp_path / "config.json").write_text(json.dumps({"models": {"small": ENTRY | changes}}))
    for weights in ("pretrained", "synthetic"):
        with pytest.raises(CheckpointError, match=f"{field} must be at most") as caught:
            stellar_fast.load("small", repo=tmp_path, weights=weights, device="cpu")
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_numbers_that_are_large_only_together():
    largest = {name: LARGEST[name] for name in BACKBONE} | {"num_attention_heads": 128}
    with pytest.raises(ValueError, match=f"at most {MOST_PARAMETERS}"):
        BackboneConfig(**largest)
    # A position table by itself.
    with pytest.raises(ValueError, match=f"at most {MOST_PARAMETERS}"):
        BackboneConfig(12_800, 1, 1, 1, 1, 2_240)


def test_no_model_is_built_to_be_trained_of_a_geometry_without_weights(tmp_path):
    geometry = BACKBONE | {"hidden_size": 12_000, "intermediate_size": 48_000, "image_size": 224}
    save_file(STATE, tmp_path / "small.safetensors")
    (tmp_path / "config.json").write_bytes(index(backbone=geometry | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing: encoder"):
        stellar_fast.load_stellar("small", "pretrain", "absent", repo=tmp_path, device="cpu")


def test_the_published_models_are_a_tenth_of_the_bounds():
    for config in MODELS.values():
        for name, most in LARGEST.items():
            owner = config if hasattr(config, name) else config.backbone
            assert 10 * getattr(owner, name) <= most
        shapes = names.vit_shapes(config.backbone, "encoder")
        counted = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert config.backbone.parameters == pytest.approx(counted, rel=0.02)
        assert 9.9 * config.backbone.parameters <= MOST_PARAMETERS


def test_a_folder_never_takes_a_repositorys_name(tmp_path, monkeypatch):
    for name in (source.PUBLISHED_REPO, "org/there"):
        folder = tmp_path / "planted" / name
        folder.mkdir(parents=True)
        for file, content in files(b"planted").items():
            (folder / file).write_bytes(content)
    monkeypatch.chdir(tmp_path / "planted")
    server = HubServer()
    try:
        honest = {"config.json": index(), "small.safetensors": b"honest"}
        as_published = json.loads(index())["models"]["small"]
        published = json.dumps({"models": {"stellar-b16": as_published}}).encode()
        server.add("org/there", honest)
        server.add(source.PUBLISHED_REPO, honest | {"config.json": published})
        cases = [
            {"name": "stellar-b16", "repo": source.PUBLISHED_REPO},
            {"name": "small", "repo": "org/there"},
            {"name": "small", "repo": "./org/there"},
            {"name": "small", "repo": str(tmp_path / "planted/org/there")},
        ]
        rows = locate_in_process(cases, server.endpoint, tmp_path / "home")
        found = [Path(row["weights"]).read_bytes() for row in rows]
        assert found == [b"honest", b"honest", b"planted", b"planted"]
        server.repos.clear()
        cases = [{"name": "small", "repo": "org/there"}]
        (row,) = locate_in_process(cases, server.endpoint, tmp_path / "empty")
    finally:
        server.close()
    assert row["error"] == "DownloadError"
    assert "for the folder here, write './org/there'" in row["message"]


def test_synthetic_geometry_is_not_taken_from_a_planted_folder(tmp_path, monkeypatch):
    folder = tmp_path / source.PUBLISHED_REPO
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(index())
    monkeypatch.chdir(tmp_path)
    assert source.local_folder(source.PUBLISHED_REPO) is None
    assert source.local_folder(Path(source.PUBLISHED_REPO)) is not None
    assert source.local_folder("microsoft") == Path("microsoft")
    with pytest.raises(DownloadError, match="no such folder"):
        source.local_folder("absent")


def test_absurd_sizes_are_not_downloaded(tmp_path):
    server = HubServer()
    try:
        large = server.add("org/config", files())
        large.extra = 10 * 10**9
        weights = server.add("org/weights", files(), large=("small.safetensors",))
        weights.on_body = lambda file: setattr(weights, "extra", 10 * 10**12)
        cases = [{"name": "small", "repo": name} for name in ("org/config", "org/weights")]
        rows = locate_in_process(cases, server.endpoint, tmp_path)
        asked = [request.path.rsplit("/")[-1] for request in server.asked("org/config", "GET")]
        asked += [request.path.rsplit("/")[-1] for request in server.asked("org/weights", "GET")]
    finally:
        server.close()
    assert asked == ["config.json"]  # that of org/weights, which is as small as it should be
    for row, stated in zip(rows, (10 * 10**9, 10 * 10**12), strict=True):
        assert row["error"] == "DownloadError"
        assert "no such file needs more than" in row["message"]
        assert any(str(stated + extra) in row["message"] for extra in range(300))


def test_honest_weights_are_within_the_size_that_is_downloaded():
    for config in MODELS.values():
        shapes = names.published_shapes(config, teacher=True) | names.vqgan_shapes()
        largest = sum(8 * torch.Size(shape).numel() for shape in shapes.values())
        assert largest < source._most_bytes(config) < 8 * largest
