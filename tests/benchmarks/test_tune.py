"""The tuner: candidates, what a row and a result file speak for, and that launches follow them."""

import json
import math
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from audit.compilation import Finding
from gpu import tune
from harness.results import lines_of
from harness.workloads import arguments, cases
from tuning import FACTS, NARROW, OTHER, OWN, THIRD, WIDE, row, sound, timing

from stellar_fast import kernels
from stellar_fast.config import MODELS
from stellar_fast.kernels import gpus, launch, tables
from stellar_fast.kernels.attention import attention_tile
from stellar_fast.kernels.linear import linear_tile
from stellar_fast.kernels.tables import AttentionTile, Table

pytestmark = pytest.mark.numerical  # the budgets that a candidate must meet
HOPPER = gpus.GPUS[90]


def case_of(name: str, batch: int = 64, precision: str = "bf16", model: str = "stellar-h16"):
    (found,) = (c for c in cases(MODELS[model], batch, precision) if c.name == name)
    return found


def written(*rows: dict) -> Table:
    content = tune.table_of(FACTS, rows)
    return tables.parsed(json.loads(json.dumps(content)), 90)


@pytest.mark.parametrize("name", ["qkv", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("arch", [90, 120])
def test_candidates_add_rows_up_as_the_heuristics_tile_does(arch, precision, name):
    case, part = case_of(name, precision=precision), gpus.GPUS[arch]
    own = tune.heuristic(part, case)
    found = tune.candidates(part, case)
    assert len(found) == len(set(found)) >= 5 and own not in found
    assert {tile.family for tile in found} == {own.family}


@pytest.mark.parametrize("name", ["qkv", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("batch", [1, 64])
def test_two_programs_a_processor_and_twice_the_depth_are_tried(batch, precision, name):
    for arch in (90, 100, 120):
        case, part = case_of(name, batch, precision), gpus.GPUS[arch]
        own, found = tune.heuristic(part, case), tune.candidates(part, case)
        assert any(tile.residents == 2 for tile in found)
        small = [tile for tile in found if tile.block_m * tile.block_n <= 128 * 64]
        assert any(tile.block_k == 2 * own.block_k for tile in small)
        if arch == 90:  # matrix instructions of four warps: rows of a tile are free
            pairs = {(t.block_m, t.block_n, t.num_warps) for t in found if t.residents == 2}
            assert {(128, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4)} <= pairs
            deep = {(t.block_m, t.block_n) for t in found if t.block_k == 2 * own.block_k}
            assert {(64, 64), (64, 128), (128, 64)} <= deep
        seen = tune.launched(case, part, next(tile for tile in found if tile.residents == 2))
        assert seen.grid[0] <= 2 * part.processors


@pytest.mark.parametrize("name", tune.OPS)
def test_a_candidate_is_what_gets_launched(name):
    case = case_of(name)
    for tile in tune.candidates(HOPPER, case)[:3]:
        item = tune.launched(case, HOPPER, tile)
        blocks = {key: value for key, value in item.arguments.items() if key.startswith("BLOCK_")}
        if name == "attention":
            assert (blocks["BLOCK_Q"], blocks["BLOCK_K"]) == (tile.block_q, tile.block_k)
        else:
            assert (blocks["BLOCK_N"], blocks["BLOCK_K"]) == (tile.block_n, tile.block_k)
        assert item.options["num_stages"] == tile.num_stages


def test_jobs_touch_no_device_and_name_a_shape_once():
    found = list(tune.jobs(("bf16", "fp8")))
    names = [key for key, _, _ in found]
    assert len(set(names)) == len(names) > 100
    # Before the rarer ones come the shapes and the batch that most extraction runs on.
    assert names[0] == "stellar-h16/b64/bf16/qkv"
    assert "stellar-h16/b64/fp8/attention" not in names, "it computes in bf16, as the other one"
    assert "stellar-b24/b64/bf16/attention" in names


def test_only_what_wins_by_more_than_the_spread_replaces_the_heuristics():
    assert tune.winner(row(OWN, {OTHER: 90.0, THIRD: 95.0})) == asdict(OTHER)
    assert tune.winner(row(OWN, {OTHER: 99.0})) == asdict(OWN)
    assert tune.winner(row(OWN, {OTHER: {"refused": "spills"}, THIRD: 97.0})) == asdict(THIRD)
    assert tune.winner(row(OWN, {OTHER: {"refused": "spills"}})) == asdict(OWN)
    other_bits = timing(90.0) | {"alike": False}
    assert tune.winner(row(OWN, {OTHER: other_bits, THIRD: 97.0})) == asdict(THIRD)
    # Best of all by its median, but its spread reaches into the other's.
    assert tune.winner(row(OWN, {OTHER: timing(90.0, 0.2)})) == asdict(OWN)


def test_between_measured_rows_the_nearer_by_ratio_decides():
    table = written(
        row(OWN, {OTHER: 90.0}, rows=100),
        row(OWN, {OTHER: 120.0}, rows=400),
        row(OWN, {THIRD: 80.0}, rows=6400),
    )
    switch = [math.ceil(math.sqrt(100 * 400)), math.ceil(math.sqrt(400 * 6400))]
    expected = {1: OTHER, switch[0] - 1: OTHER, switch[0]: OWN, switch[1] - 1: OWN}
    expected |= {switch[1]: THIRD, 10**9: THIRD}
    found = {rows: table.linear_tile("bf16", rows, 3840, 1280) for rows in expected}
    assert found == expected
    assert table.linear_tile("bf16", 100, 1280, 3840) is None
    assert table.linear_tile("fp8", 100, 3840, 1280) is None


def test_a_tile_is_written_once_for_all_rows_that_it_wins():
    content = tune.table_of(FACTS, [row(OWN, {OTHER: 90.0}, rows=n) for n in (9, 99)])
    assert [(tile["rows"], tile["block_n"]) for tile in content["linear"][0]["tiles"]] == [(1, 128)]


def test_a_table_that_kernels_would_refuse_is_not_made():
    with pytest.raises(ValueError, match="block_n is 48"):
        written(row(OWN, {replace(OTHER, block_n=48): 90.0}))


def test_a_shape_that_nothing_wins_stays_with_the_heuristics():
    table = written(
        row(OWN, {OTHER: 99.5}, rows=100), row(OWN, {OTHER: 80.0}, shape=("bf16", 8, 8))
    )
    assert set(table.linear) == {("bf16", 8, 8)}


def test_attention_is_tuned_by_the_rows_of_all_images():
    shape = ("bf16", 273, 80)
    table = written(row(NARROW, {WIDE: 120.0}, 100, shape), row(NARROW, {WIDE: 80.0}, 400, shape))
    assert table.attention == {shape: ((1, NARROW), (200, WIDE))}


def test_rows_that_were_refused_have_no_say():
    refused = {k: v for k, v in row(OWN, {OTHER: 10.0}).items() if k != "median"}
    failed = {"stage": "tune", "key": "x", "name": "kernel", "failed": "ValueError"}
    table = written(refused | {"refused": "wrong"}, failed, row(OWN, {THIRD: 90.0}))
    assert table.linear == {("bf16", 3840, 1280): ((1, THIRD),)}


@pytest.mark.parametrize("archs", [(), (90, 100)])
def test_a_file_of_no_part_or_of_several_makes_no_table(archs):
    rows = [row(OWN, {OTHER: 90.0}, arch=arch) for arch in archs]
    with pytest.raises(ValueError, match="rows of the stage 'tune' are of"):
        tune.table_of(FACTS, rows)


def test_the_command_writes_what_the_kernels_read(tmp_path, capsys):
    result, folder = tmp_path / "result.jsonl", tmp_path / "tuned"
    other = {**row(OWN, {OTHER: 10.0}, shape=("bf16", 8, 8)), "stage": "ops"}
    result.write_bytes(lines_of([FACTS, [row(OWN, {OTHER: 90.0})], [other]]))
    assert tune.main([str(result), "--out", str(folder / "sm_90.json")]) == 0
    said = capsys.readouterr().out
    assert "1 products and 0 attentions" in said and "audit/run.py --arch 90" in said
    table = tables.table(90, folder)
    assert table.linear == {("bf16", 3840, 1280): ((1, OTHER),)}
    assert tables.table(80, folder) == tables.EMPTY
    assert json.loads((folder / "sm_90.json").read_text())["date"] == FACTS["date"]


@pytest.mark.parametrize("text", ["{", "{}", '{"rows": []}', None])
def test_the_command_names_a_result_it_cannot_read(tmp_path, capsys, text):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        tune.main([str(path), "--out", str(tmp_path / "table.json")])
    assert stop.value.code == 2
    assert f"{path}: " in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


def test_launches_follow_the_table_where_it_has_the_shape():
    shape = (HOPPER, torch.bfloat16, 500, 3840, 1280)
    usual = linear_tile(*shape)
    table = Table(
        linear={("bf16", 3840, 1280): ((1, OTHER), (1000, THIRD))},
        attention={("bf16", 273, 80): ((1, NARROW), (400, WIDE))},
    )
    with launch.tuned_by(table):
        assert linear_tile(*shape) == OTHER
        assert linear_tile(HOPPER, torch.bfloat16, 1000, 3840, 1280) == THIRD
        assert attention_tile(HOPPER, torch.bfloat16, 1, 16, 273, 80) == NARROW
        assert attention_tile(HOPPER, torch.float16, 2, 16, 273, 80) == WIDE
        # As wide as bfloat16; what the table lacks: another dtype.
        assert linear_tile(HOPPER, torch.float16, 500, 3840, 1280) == OTHER
        linear_tile(HOPPER, torch.float64, 500, 3840, 1280)
    assert linear_tile(*shape) == usual


def test_launches_read_the_parts_own_table(tmp_path, monkeypatch):
    (tmp_path / "sm_90.json").write_text(json.dumps(sound()))
    monkeypatch.setattr(launch, "table", partial(tables.table, folder=tmp_path))
    case = case_of("qkv")
    for arch, stages in ((90, 4), (100, 3)):
        seen = []
        with launch.on_gpu(arch, seen.append):
            values, keywords = arguments(case, tune.META, 0)
            kernels.linear(*values, **keywords)
        assert seen[0].options["num_stages"] == stages, arch


def test_what_is_raced_is_the_heuristics_tile_whatever_table_is_there(monkeypatch):
    case = case_of("qkv")
    found = tune.heuristic(HOPPER, case)
    table = Table(linear={("bf16", 3840, 1280): ((1, THIRD),)})
    monkeypatch.setattr(launch, "table", lambda arch: table)
    assert tune.heuristic(HOPPER, case) == found != THIRD
    seen = []

    class Race:
        def __init__(self, *_, **__):
            seen.append(linear_tile(HOPPER, torch.bfloat16, case.rows, 3840, 1280))
            raise InterruptedError

    monkeypatch.setattr(tune, "Race", Race)
    monkeypatch.setattr(tune, "arguments", lambda *_: None)
    monkeypatch.setattr(tune, "_results", lambda *_: [])
    with pytest.raises(InterruptedError):
        tune.measure(case, HOPPER, {}, torch.device("cpu"))
    assert seen == [found]


def audited(*faults: str) -> Future:
    future: Future = Future()
    future.set_result(Finding(0, 0, 0, 0, 0, (), faults, None))
    return future


@pytest.fixture
def tiny(monkeypatch) -> str:
    """A model with few and short heads, for the interpreter; two rounds, which a spread needs."""
    monkeypatch.setattr(tune, "LEAST", 2)
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    vit = replace(MODELS["stellar-b8"].backbone, hidden_size=128, num_attention_heads=2)
    model = replace(MODELS["stellar-b8"], name="tiny", backbone=replace(vit, image_size=64))
    monkeypatch.setitem(MODELS, "tiny", model)
    return "tiny"


def test_every_candidate_is_timed_or_says_why_not(monkeypatch, tiny):
    case = case_of("attention", batch=1, precision="fp32", model=tiny)
    good, spills, wrong = (
        AttentionTile(64, 64, 4, 1),
        AttentionTile(128, 64, 8, 1),
        AttentionTile(64, 128, 4, 1),
    )
    attention, seen = kernels.attention, []

    def watched(query, key_value, num_heads, **options):
        tile = attention_tile(HOPPER, query.dtype, 1, num_heads, query.shape[1], 64)
        seen.append(tile)
        found = attention(query, key_value, num_heads, **options)
        return found * 1.01 if tile == wrong else found

    monkeypatch.setattr(kernels, "attention", watched)
    audits = {good: audited(), spills: audited("spills: 8 B of stack"), wrong: audited()}
    found = tune.measure(case, HOPPER, audits, torch.device("cpu"))
    tried = {AttentionTile(**item.pop("tile")): item for item in found["tiles"]}
    assert tried[good]["median"] > 0 and "refused" not in tried[good]
    assert tried[spills] == {"refused": "spills: 8 B of stack"}
    assert "exceeds its budget" in tried[wrong]["refused"] and "median" not in tried[wrong]
    assert spills not in seen and {good, wrong} <= set(seen)
    assert found["median"] > 0
    assert found[tune.OURS] == asdict(tune.heuristic(HOPPER, case))
    length = 1 + 16 + 8
    assert (found["shape"], found["rows"], found["arch"]) == (["fp32", length, 64], length, 90)
    json.dumps(found)


def test_a_candidate_that_fails_costs_only_itself(monkeypatch, tiny):
    case = case_of("attention", batch=1, precision="fp32", model=tiny)
    tile = AttentionTile(64, 64, 4, 1)
    passed = iter(range(1))

    def fails(*_, **__):
        if next(passed, None) is None:
            raise RuntimeError("out of resources: shared memory")
        return real(*_, **__)

    real = kernels.attention
    monkeypatch.setattr(kernels, "attention", fails)
    monkeypatch.setattr(tune, "_results", lambda *_: [])
    found = tune.measure(case, HOPPER, {tile: audited()}, torch.device("cpu"))
    (item,) = found["tiles"]
    assert "out of resources" in item["refused"]
    assert tune.winner(found) == found[tune.OURS]


def test_a_wrong_op_of_ours_is_refused_and_speaks_for_nothing(monkeypatch, tiny):
    case = case_of("attention", batch=1, precision="fp32", model=tiny)
    real = tune.Race._refusal
    monkeypatch.setattr(tune.Race, "_refusal", lambda *a: real(*a) or "planted")
    found = tune.measure(case, HOPPER, {}, torch.device("cpu"))
    assert found["refused"] == "planted"
    with pytest.raises(ValueError, match="no GPU"):
        tune.table_of(FACTS, [found])
