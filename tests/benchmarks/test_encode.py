"""The CPU benchmark on a tiny model: the slow are caught, the wrong refused a figure."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import compare
import contest
import footprint
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
def pool(subject) -> contest.Pool:
    plain = {precision: subject.eager(precision) for precision in ("fp32", "bf16")}
    images = contest.pictures(5, 64, 0)
    return contest.Pool("tiny", images, subject.eager("fp64"), plain)


@pytest.fixture(scope="module")
def entrants(subject, pool) -> list[contest.Local]:
    names = ("reference fp32 eager", "engine fp32", "engine bf16")
    found = [peers.local(subject, name, pool.images[:2]) for name in names]
    for entrant in found:
        entrant.encode(pool.images[:2])  # warm
    return found


def rows_of(pool: contest.Pool, entrants: list) -> dict[str, dict]:
    match = contest.Contest(pool, entrants, batch=2, sets=3, rounds=ROUNDS)
    match.finish()
    return {row["name"]: row for row in match.rows()}


def write(folder, rows: dict[str, dict], name: str):
    """A result file of these rows, as the benchmark writes it."""
    facts = {"processor": harness.processor(), "baseline": contest.BASELINE}
    result = {"name": "encode", "date": "2026-01-01", "commit": name, **facts}
    path = folder / f"2026-01-01-{name}-encode.json"
    path.write_text(json.dumps({**result, "rows": list(rows.values())}))
    return path


def slowed(entrant: contest.Local) -> contest.Local:
    """Ten times slower: it does its work ten times."""

    def encode(images):
        for _ in range(9):
            entrant.encode(images)
        return entrant.encode(images)

    return replace(entrant, encode=encode)


def wrong(entrant: contest.Entrant, output: str, after: int = 0) -> contest.Local:
    """One number of one output is off, from its call number `after` on."""
    calls = iter(range(1000))

    def encode(images):
        found = dict(entrant.encode(images))
        if next(calls) >= after:
            found[output] = found[output].clone()
            found[output].view(-1)[3] += 0.5
        return found

    return replace(entrant, encode=encode)


def test_everyone_right_gets_a_figure(pool, entrants):
    rows = rows_of(pool, entrants)
    assert list(rows) == ["reference fp32 eager", "engine fp32", "engine bf16"]
    for row in rows.values():
        assert row["rounds"] == ROUNDS and row["speedup"] > 0
        assert set(row["error"]) == set(pool.exact)
    assert rows["reference fp32 eager"]["speedup"] == 1
    assert rows["engine fp32"]["error"]["dense"] < 1e-5 < rows["engine bf16"]["error"]["dense"]


def test_a_slowed_engine_is_caught_by_the_comparison(
    pool, entrants, tmp_path, capsys, monkeypatch, request
):
    # Time that this thread spends at work, and it alone, whoever else uses the machine.
    monkeypatch.setattr(contest, "time", SimpleNamespace(perf_counter=time.thread_time))
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    old = write(tmp_path, rows_of(pool, entrants), "aaa")
    plain, fp32, bf16 = entrants
    new = write(tmp_path, rows_of(pool, [plain, slowed(fp32), bf16]), "bbb")
    assert compare.main([str(new), str(old)]) == 1
    said = capsys.readouterr().out
    assert "SLOWER engine fp32, tiny, batch 2" in said
    assert compare.main([str(old), str(old)]) == 0
    assert "SLOWER" not in capsys.readouterr().out


@pytest.mark.parametrize("output", ["sparse", "spatial", "dense", "lowrank", "cls"])
def test_a_wrong_engine_is_refused_a_figure(pool, entrants, output):
    plain, fp32, _ = entrants
    row = rows_of(pool, [plain, wrong(fp32, output)])["engine fp32"]
    assert row["refused"].startswith(f"{output}: error")
    assert not {"median", "images_per_second", "speedup"} & set(row)
    assert any("refused: " in line and "img/s" not in line for line in contest.table([row]))


def test_the_last_round_is_checked_too(pool, entrants):
    plain, fp32, _ = entrants
    row = rows_of(pool, [plain, wrong(fp32, "cls", after=ROUNDS - 1)])["engine fp32"]
    assert "refused" in row


def test_an_engine_that_lost_its_figure_fails_the_comparison(pool, entrants, tmp_path, capsys):
    plain, fp32, _ = entrants
    old = write(tmp_path, rows_of(pool, [plain, fp32]), "aaa")
    new = write(tmp_path, rows_of(pool, [plain, wrong(fp32, "dense")]), "bbb")
    assert compare.main([str(new), str(old)]) == 1
    assert "no figure now: dense: error" in capsys.readouterr().out


def test_inputs_rotate_and_differ(pool, entrants):
    seen = []
    plain = entrants[0]
    spy = replace(plain, encode=lambda images: (seen.append(images), plain.encode(images))[1])
    rows_of(pool, [spy])
    assert [pool.rows(2, index).tolist() for index in range(3)] == [[0, 1], [2, 3], [4, 0]]
    sets = [pool.images[rows] for rows in ([0, 1], [2, 3], [4, 0])]
    expected = [sets[index] for index in (0, 1, 2, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert not torch.equal(sets[0], sets[1]) and pool.images.std() > 0.1


def test_turns_alternate_in_changing_order_and_ours_may_be_called_from_outside(pool, entrants):
    calls: list[str] = []

    def spy(entrant: contest.Local) -> contest.Local:
        def encode(images):
            calls.append(entrant.name)
            return entrant.encode(images)

        return replace(entrant, encode=encode)

    names = [entrant.name for entrant in entrants]
    match = contest.Contest(pool, list(map(spy, entrants)), batch=2, sets=3, rounds=6)
    for _ in range(6):
        match.until("engine fp32")
        assert calls.count("engine fp32") == len(match.seconds["engine fp32"])
        match.next()
        match.done()
    match.finish()
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 6 and all(sorted(found) == sorted(names) for found in rounds)
    assert len({tuple(found) for found in rounds}) > 1
    assert all(row["rounds"] == 6 for row in match.rows())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torch.compile max-autotune fp32", marks=pytest.mark.slow),
        "OpenVINO fp32",
        "OpenVINO bf16",
        "ONNX Runtime fp32",
    ],
)
def test_a_peer_keeps_the_budget(name, subject, pool, entrants):
    try:
        peer = peers.local(subject, name, pool.images[:2])
    except peers.Absent as reason:
        pytest.skip(str(reason))
    assert "refused" not in rows_of(pool, [entrants[0], peer])[name]


def test_an_absent_peer_has_a_reason(subject, pool, monkeypatch):
    for package in ("openvino", "onnxruntime", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(subject, "openvino_graph", subject._openvino_graph)
    monkeypatch.setattr(subject, "vit", subject._vit)
    for name, package in (
        ("OpenVINO fp32", "openvino"),
        ("ONNX Runtime fp32", "onnxruntime"),
        (peers.VIT, "transformers"),
    ):
        with pytest.raises(peers.Absent, match=f"{package} is not installed \\(extra `peers`"):
            peers.local(subject, name, pool.images[:2])


@pytest.fixture
def remote_of(tmp_path):
    made = []

    def make(name: str) -> peers.Remote:
        made.append(peers.Remote(name, TINY, tmp_path / str(len(made)), threads=1))
        return made[-1]

    yield make
    for remote in made:
        remote.close()
    assert not any(remote._process.is_alive() for remote in made)


def test_processes_of_their_own_give_the_same_features(remote_of, pool, entrants):
    remotes = [remote_of(entrant.name) for entrant in entrants[:2]]
    for remote, entrant in zip(remotes, entrants, strict=False):
        remote.prepare(pool.images[:2])
        assert remote.facts["prepare_seconds"] > 0
        remote.load(pool.images[2:4])
        assert 0 < remote.run() < 60
        entrant.load(pool.images[2:4])
        entrant.run()
        found, expected = remote.fetch(), entrant.fetch()
        for name in expected:
            assert harness.relative_error(found[name], expected[name]) < 1e-5
    assert all("refused" not in row for row in rows_of(pool, remotes).values())


def test_errors_in_another_process_arrive(remote_of):
    remote = remote_of("engine fp32")
    with pytest.raises(RuntimeError, match="engine fp32: "):
        remote.prepare(torch.zeros(1, 4, 64, 64))
    remote.prepare(torch.zeros(1, 3, 64, 64))


def test_the_backbone_of_transformers_is_held_against_its_own_float64(remote_of, pool, entrants):
    pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
    remote = remote_of(peers.VIT)
    remote.prepare(pool.images[:2])
    row = rows_of(pool, [entrants[0], remote])[peers.VIT]
    assert "refused" not in row and 0 < row["error"]["last_hidden_state"] < 1e-5


def test_peak_memory_is_that_of_the_process_itself(tmp_path):
    ballast = torch.ones(300 * 2**20 // 4)  # 300 MiB that a child must not be told to have
    engine, _, reference = footprint.measure_all(TINY, tmp_path, batch=2, side=64)
    assert [engine["name"], reference["name"]] == ["engine fp32", "reference fp32"]
    for found in (engine, reference):
        assert 50 < found["imported_mib"] <= found["loaded_mib"] <= found["peak_mib"]
        assert found["peak_mib"] < found["imported_mib"] + 200 and found["load_seconds"] > 0
    assert ballast.sum() > 0
