"""The CPU benchmark on a tiny model: the slow are caught, the wrong refused a figure."""

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import compare
import pytest
import torch
from harness.rounding import relative_error
from peers import contest, footprint, models

from stellar_fast.engine import backends
from stellar_fast.precision import has_int8_units

ROUNDS = 5


def rows_of(pool, entrants) -> dict[str, dict]:
    found = contest.race(pool, entrants, batch=2, sets=3, rounds=ROUNDS)
    return {row["name"]: row for row in found}


def slowed(entrant: models.Local) -> models.Local:
    """Ten times slower: it does its work ten times."""

    def encode(images):
        return [entrant.encode(images) for _ in range(10)][-1]

    return replace(entrant, encode=encode)


def wrong(entrant: models.Local, output: str, after: int = 0) -> models.Local:
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
        assert row["rounds"] == ROUNDS and (row["stage"], row["key"]) == ("encode", "tiny/b2")
        assert row["speedup"] == rows["reference fp32 eager"]["median"] / row["median"]
        assert row["images_per_second"] == 2 / row["median"]
        assert set(row["error"]) == set(pool.exact)
    assert rows["engine fp32"]["error"]["dense"] < 1e-5 < rows["engine bf16"]["error"]["dense"]


def test_a_slowed_engine_is_caught_by_the_comparison(
    pool, entrants, plant, capsys, monkeypatch, request
):
    # Time that this thread spends at work, and it alone, whoever else uses the machine.
    monkeypatch.setattr(models, "time", SimpleNamespace(perf_counter=time.thread_time))
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    plain, fp32, bf16 = entrants
    old = plant(rows_of(pool, entrants).values())
    new = plant(rows_of(pool, [plain, slowed(fp32), bf16]).values(), commit="b")
    assert compare.main([str(new), str(old)]) == 1
    assert "SLOWER engine fp32, tiny/b2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "after"), [("sparse", 0), ("spatial", 0), ("dense", 1), ("cls", ROUNDS - 1)]
)
def test_a_wrong_engine_is_refused_a_figure_whenever_it_is_wrong(pool, entrants, output, after):
    plain, fp32, _ = entrants
    row = rows_of(pool, [plain, wrong(fp32, output, after)])["engine fp32"]
    assert row["refused"].startswith(f"{output}: error")
    assert not {"median", "images_per_second", "speedup"} & set(row)
    assert any("refused: " in line and "img/s" not in line for line in contest.report([row]))


def test_inputs_rotate_and_differ(pool, entrants):
    seen = []
    plain = entrants[0]
    spy = replace(plain, encode=lambda images: (seen.append(images), plain.encode(images))[1])
    rows_of(pool, [spy])
    sets = [pool.images[rows] for rows in ([0, 1], [2, 3], [4, 0])]
    expected = [sets[index] for index in (0, 1, 2, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert not torch.equal(sets[0], sets[1]) and pool.images.std() > 0.1


@pytest.mark.parametrize("name", ["OpenVINO fp32", "OpenVINO bf16", "ONNX Runtime fp32"])
def test_a_peer_keeps_the_budget(name, subject, pool, entrants):
    try:
        # Not the batch that OpenVINO's tracer is shown: what it took for constant is noticed.
        peer = models.local(subject, name, pool.images[:3])
    except models.Absent as reason:
        pytest.skip(str(reason))
    found, rows = peer.encode(pool.images[:3]), torch.arange(3)
    _, refused = pool.judge(peer, found, rows)
    assert refused is None
    off = {name: value + value.std() for name, value in found.items()}
    assert pool.judge(peer, off, rows)[1] is not None


def test_int8_is_judged_by_its_error_alone(subject, pool, entrants):
    if not has_int8_units() or not backends.has_openvino():
        pytest.skip("int8 needs OpenVINO and a processor with 8-bit products")
    int8 = models.local(subject, models.INT8, pool.images[:2])
    rows = rows_of(pool, [entrants[0], int8])
    assert max(rows[models.INT8]["error"].values()) > 1e-3

    def broken(images):
        return {name: value * float("nan") for name, value in int8.encode(images).items()}

    row = rows_of(pool, [entrants[0], replace(int8, encode=broken)])[models.INT8]
    assert "refused" in row


def test_bytes_in_and_few_outputs_are_judged_too(subject, pool, entrants):
    few = models.local(subject, models.BYTES, pool.images[:2])
    few.load(pool.images[:2])
    assert few._images.dtype == torch.uint8
    row = rows_of(pool, [entrants[0], few])[models.BYTES]
    assert set(row["error"]) == {"sparse", "cls"} and "refused" not in row


def test_an_absent_peer_has_a_reason(subject, pool, monkeypatch):
    for package in ("openvino", "onnxruntime", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(subject, "openvino_graph", subject._openvino_graph)
    monkeypatch.setattr(subject, "vit", subject._vit)
    for name, package in (
        ("OpenVINO fp32", "openvino"),
        ("ONNX Runtime fp32", "onnxruntime"),
        (models.VIT, "transformers"),
    ):
        with pytest.raises(models.Absent, match=f"{package} is not installed \\(extra `peers`"):
            models.local(subject, name, pool.images[:2])


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_features_and_its_errors(
    tiny, tmp_path, pool, entrants
):
    remote = models.Remote("engine fp32", tiny, tmp_path / "remote", threads=1)
    with pytest.raises(RuntimeError, match="engine fp32: ValueError"):
        remote.prepare(torch.zeros(1, 4, 64, 64))
    remote.prepare(pool.images[:2])
    assert remote.facts["prepare_seconds"] > 0
    rows = rows_of(pool, [entrants[0], remote])
    assert rows["engine fp32"]["prepare_seconds"] > 0 and "median" in rows["engine fp32"]
    remote.load(pool.images[2:4])
    assert remote.run() > 0
    expected = entrants[1].encode(pool.images[2:4])
    for name, found in remote.fetch().items():
        assert relative_error(found, expected[name]) < 1e-5
    (worker,) = remote._pool._processes.values()
    remote.close()
    assert not worker.is_alive()


def test_the_backbone_of_transformers_is_held_against_its_own_float64(
    tiny, tmp_path, pool, entrants
):
    pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
    remote = models.Remote(models.VIT, tiny, tmp_path / "remote", threads=1)
    remote.prepare(pool.images[:2])
    row = rows_of(pool, [entrants[0], remote])[models.VIT]
    remote.close()
    assert "refused" not in row and 0 < row["error"]["last_hidden_state"] < 1e-5


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_itself(tiny, tmp_path, monkeypatch):
    ballast = torch.ones(300 * 2**20 // 4)  # 300 MiB that a child must not be told to have
    monkeypatch.setattr(footprint, "NAMES", ("engine-fp32", "reference-fp32"))
    rows = footprint.measure_all(tiny, tmp_path, batch=2, side=64)
    assert [row["name"] for row in rows] == ["engine fp32", "reference fp32"]
    for found in rows:
        assert 50 < found["imported_mib"] <= found["loaded_mib"] <= found["peak_mib"]
        assert found["peak_mib"] < found["imported_mib"] + 200 and found["load_seconds"] > 0
    assert ballast.sum() > 0
