"""Which ratio counts as slower, and what a result is compared with."""

import copy
import json
import subprocess

import compare
import harness
import pytest

PROCESSOR = {"name": "x", "family": "6", "model": "1", "threads": 2, "cores": 2}


def timing(name: str, median: float, spread: float, batch: int = 8, speedup: float = 1.0) -> dict:
    low, high = median * (1 - spread / 2), median * (1 + spread / 2)
    facts = {"name": name, "model": "m", "batch": batch, "speedup": speedup}
    return {**facts, "median": median, "low": low, "high": high, "rounds": 9}


def result(speedup: float, spread: float = 0.0) -> dict:
    rows = [timing("reference fp32 eager", 1, spread)]
    rows.append(timing("engine fp32", 1 / speedup, spread, speedup=speedup))
    rows.append(timing("OpenVINO fp32", 1, spread))
    facts = {"name": "encode", "date": "2026-01-01", "commit": "abc", "processor": PROCESSOR}
    return {**facts, "baseline": "reference fp32 eager", "rows": rows}


def test_the_tolerance_is_the_drift_and_four_spreads():
    (change,) = compare.changes(result(1.2, 0.01), result(1.2, 0.02))
    expected = compare.DRIFT + (2 * 0.01**2 + 2 * 0.02**2) ** 0.5
    assert change.tolerance == pytest.approx(expected) and not change.slower


@pytest.mark.parametrize(
    ("new", "spread", "slower"),
    [(1.2, 0, False), (1.18, 0, False), (1.15, 0, True), (1.15, 0.02, False), (2.0, 0, False)],
)
def test_slower_is_beyond_the_tolerance(new, spread, slower):
    (change,) = compare.changes(result(new, spread), result(1.2, spread))
    assert change.slower is slower
    assert "engine fp32, m, batch 8" in str(change) and f"{new:.3f}x" in str(change)
    assert "1.200x before" in str(change) and f"{-change.tolerance:.1%}" in str(change)


def test_a_machine_that_is_slower_as_a_whole_is_not_a_slower_engine():
    new = result(1.2)
    for row in new["rows"]:
        row |= {key: row[key] * 3 for key in ("median", "low", "high")}
    (change,) = compare.changes(new, result(1.2))
    assert not change.slower


def test_a_slower_peer_is_not_ours():
    new = result(1.2)
    new["rows"][2]["speedup"] = 0.1
    assert [change.slower for change in compare.changes(new, result(1.2))] == [False]


def test_batches_that_did_not_run_are_left_out_and_rows_that_vanished_are_not():
    old = result(1.2)
    old["rows"].append(timing("engine fp32", 1, 0, batch=32))
    assert len(compare.changes(result(1.2), old)) == 1
    new = result(1.2)
    del new["rows"][1]
    (change,) = compare.changes(new, result(1.2))
    assert change.slower and "no such row" in str(change)


def test_another_processor_is_an_error_where_named(tmp_path, capsys):
    other = copy.deepcopy(result(1.2))
    other["processor"]["name"] = "y"
    paths = []
    for name, content in (("a", result(1.2)), ("b", other)):
        paths.append(tmp_path / f"{name}-encode.json")
        paths[-1].write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        compare.main([str(path) for path in paths])
    assert stop.value.code == 2
    assert "another benchmark or processor" in capsys.readouterr().err


def test_the_stored_result_is_the_newest_committed_one_of_this_processor(tmp_path, monkeypatch):
    folder = tmp_path / "cpu"
    folder.mkdir()

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    def put(name: str, speedup: float, **facts: object):
        path = folder / f"{name}-encode.json"
        path.write_text(json.dumps(result(speedup) | facts))
        return path

    git("init", "-q")
    (tmp_path / "readme").write_text("")
    git("add", "readme")
    git("commit", "-qm", "empty")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    new = put("2026-06-01-new", 1.0, date="2026-06-01")
    assert compare.report(new) == (["nothing stored of this processor to compare with"], False)
    put("2026-01-01-old", 1.0)
    put("2026-02-01-mid", 1.3, date="2026-02-01")
    put("2026-03-01-other", 9.0, date="2026-03-01", processor=PROCESSOR | {"threads": 4})
    git("add", "cpu")
    git("commit", "-qm", "results")
    put("2026-05-01-own", 1.0, date="2026-05-01")  # not committed
    lines, slower = compare.report(new)
    assert slower and "2026-02-01-mid-encode.json" in lines[0]
