"""The CPU benchmark on a tiny model: the slow are caught, the wrong refused a figure."""

import json
import time
from dataclasses import replace

import compare
import contest
import harness
import peers
import pytest
import torch

from stellar_fast.config import BackboneConfig, ModelConfig

TINY = ModelConfig("tiny", BackboneConfig(64, 2, 2, 128, 16, 64), num_sparse_tokens=4)
ROUNDS = 5


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> peers.Subject:
    return peers.Subject(TINY, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(subject) -> contest.Task:
    inputs = [contest.pictures(2, 64, seed) for seed in range(2)]
    plain = {precision: subject.eager(precision) for precision in ("fp32", "bf16")}
    return contest.Task.of("tiny", inputs, subject.eager("fp64"), plain)


@pytest.fixture(scope="module")
def entrants(subject) -> list[contest.Entrant]:
    return [subject.plain("fp32"), subject.engine("fp32"), subject.engine("bf16")]


def rows_of(task: contest.Task, entrants: list[contest.Entrant]) -> dict[str, dict]:
    match = contest.Contest(task, entrants)
    for _ in range(ROUNDS):
        match.round()
    return {row["name"]: row for row in match.rows()}


def write(folder, rows: dict[str, dict], name: str):
    """A result file of these rows, as the benchmark writes it."""
    facts = {"processor": harness.processor(), "baseline": contest.BASELINE}
    result = {"name": "encode", "date": "2026-01-01", "commit": name, **facts}
    path = folder / f"2026-01-01-{name}-encode.json"
    path.write_text(json.dumps({**result, "rows": list(rows.values())}))
    return path


def slowed(entrant: contest.Entrant) -> contest.Entrant:
    """Ten times slower and 20 ms: beyond any spread of a busy machine."""

    def encode(images):
        start = time.perf_counter()
        found = entrant.encode(images)
        time.sleep(0.02 + 9 * (time.perf_counter() - start))
        return found

    return replace(entrant, encode=encode)


def wrong(entrant: contest.Entrant, output: str, after: int = 0) -> contest.Entrant:
    """One number of one output is off, from its call number `after` on."""
    calls = iter(range(1000))

    def encode(images):
        found = dict(entrant.encode(images))
        if next(calls) >= after:
            found[output] = found[output].clone()
            found[output].view(-1)[3] += 0.5
        return found

    return replace(entrant, encode=encode)


def test_everyone_right_gets_a_figure(task, entrants):
    rows = rows_of(task, entrants)
    assert list(rows) == ["reference fp32 eager", "engine fp32", "engine bf16"]
    for row in rows.values():
        assert row["rounds"] == ROUNDS and row["speedup"] > 0
        assert set(row["error"]) == set(task.exact[0])
    assert rows["reference fp32 eager"]["speedup"] == 1
    assert rows["engine fp32"]["error"]["dense"] < 1e-5 < rows["engine bf16"]["error"]["dense"]


def test_a_slowed_engine_is_caught_by_the_comparison(task, entrants, tmp_path, capsys):
    old = write(tmp_path, rows_of(task, entrants), "aaa")
    plain, fp32, bf16 = entrants
    new = write(tmp_path, rows_of(task, [plain, slowed(fp32), bf16]), "bbb")
    assert compare.main([str(new), str(old)]) == 1
    said = capsys.readouterr().out
    assert "SLOWER engine fp32, tiny, batch 2" in said
    assert compare.main([str(old), str(old)]) == 0
    assert "SLOWER" not in capsys.readouterr().out


@pytest.mark.parametrize("output", ["sparse", "spatial", "dense", "lowrank", "cls"])
def test_a_wrong_engine_is_refused_a_figure(task, entrants, output):
    plain, fp32, _ = entrants
    row = rows_of(task, [plain, wrong(fp32, output)])["engine fp32"]
    assert row["refused"].startswith(f"{output}: error")
    assert not {"median", "images_per_second", "speedup"} & set(row)
    assert any("refused: " in line and "img/s" not in line for line in contest.table([row]))


def test_the_last_round_is_checked_too(task, entrants):
    plain, fp32, _ = entrants
    row = rows_of(task, [plain, wrong(fp32, "cls", after=ROUNDS)])["engine fp32"]
    assert "refused" in row


def test_an_engine_that_lost_its_figure_fails_the_comparison(task, entrants, tmp_path, capsys):
    plain, fp32, _ = entrants
    old = write(tmp_path, rows_of(task, [plain, fp32]), "aaa")
    new = write(tmp_path, rows_of(task, [plain, wrong(fp32, "dense")]), "bbb")
    assert compare.main([str(new), str(old)]) == 1
    assert "no figure now: dense: error" in capsys.readouterr().out


def test_inputs_rotate_and_differ(task, entrants):
    seen = []
    plain = entrants[0]
    spy = replace(plain, encode=lambda images: (seen.append(id(images)), plain.encode(images))[1])
    rows_of(task, [spy])
    first, second = (id(images) for images in task.inputs)
    assert seen == [first, second, first, second, first, second]
    assert not torch.equal(task.inputs[0], task.inputs[1])
    assert task.inputs[0].std() > 0.1


def test_an_absent_peer_has_a_reason(subject, monkeypatch):
    monkeypatch.setitem(peers.sys.modules, "openvino", None)
    makers = {
        "fp32": lambda: subject.plain("fp32"),
        "OpenVINO": lambda: peers.openvino(subject, contest.pictures(1, 64, 0), "fp32"),
    }
    entrants, absent = peers.present(makers)
    assert [entrant.name for entrant in entrants] == ["reference fp32 eager"]
    assert "openvino is not installed (extra `peers`)" in absent["OpenVINO"]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("openvino", lambda subject, images, folder: peers.openvino(subject, images, "fp32")),
        ("onnxruntime", peers.onnxruntime),
        ("transformers", lambda subject, images, folder: peers.transformers_vit(subject)),
    ],
)
def test_a_peer_keeps_the_budget(package, make, subject, task, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `peers`)")
    entrant = make(subject, task.inputs[0], tmp_path)
    row = rows_of(task, [subject.plain("fp32"), entrant])[entrant.name]
    assert "refused" not in row, row
