"""Which ratio counts as slower, and what a result is compared with."""

import subprocess

import compare
import pytest
from harness import results
from harness.results import Result, read


def row(name: str, seconds: float, spread: float, batch: int = 8) -> dict:
    low, high = seconds * (1 - spread / 2), seconds * (1 + spread / 2)
    facts = {"stage": "encode", "key": f"m/b{batch}", "name": name, "batch": batch}
    return {**facts, "median": seconds, "low": low, "high": high, "rounds": 9}


def rows_at(speedup: float, spread: float = 0.0) -> list[dict]:
    others = [row("reference fp32 eager", 1, spread), row("OpenVINO fp32", 1, spread)]
    return [*others, row("engine fp32", 1 / speedup, spread)]


def result(speedup: float, spread: float = 0.0, rows: list | None = None) -> Result:
    found = Result(results.RESULTS)
    for line in [{"name": "encode"}, *results.jobs_of(rows or rows_at(speedup, spread))]:
        found.take(line)
    return found


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
    assert "engine fp32, m/b8" in str(change) and f"{new:.3f}x" in str(change)
    assert "1.200x before" in str(change) and f"{-change.tolerance:.1%}" in str(change)


def test_a_slower_machine_or_peer_is_no_slower_engine():
    rows = [r | {k: 3 * r[k] for k in ("median", "low", "high")} for r in rows_at(1.2)]
    rows[1]["median"] = 99.0
    (change,) = compare.changes(result(0, rows=rows), result(1.2))
    assert not change.slower


def test_jobs_that_did_not_run_are_left_out_and_rows_that_vanished_are_not():
    old = result(0, rows=[*rows_at(1.2), row("engine fp32", 1, 0, batch=32)])
    assert len(compare.changes(result(1.2), old)) == 1
    for rows, why in (
        (rows_at(1.2)[:2], "no such row"),
        ([*rows_at(1.2)[:2], rows_at(1.2)[2] | {"refused": "cls: error 1"}], "refused: cls: error"),
        (rows_at(1.2)[1:], "the baseline has none"),
    ):
        (change,) = compare.changes(result(0, rows=rows), result(1.2))
        assert change.slower and why in str(change)


def test_ops_are_compared_over_plain_pytorch():
    def op(seconds: float) -> list[dict]:
        rows = [row("engine", seconds, 0), row("eager", 1.0, 0)]
        return [{**r, "stage": "ops", "key": "m/b1/fp32/norm"} for r in rows]

    (change,) = compare.changes(result(0, rows=op(2.0)), result(0, rows=op(1.0)))
    assert change.slower and "engine, m/b1/fp32/norm: 0.500x" in str(change)


def test_another_machine_is_an_error_where_named(plant, capsys):
    paths = [plant(rows_at(1.2)), plant(rows_at(1.0), commit="b", processor={"name": "y"})]
    with pytest.raises(SystemExit) as stop:
        compare.main([str(path) for path in paths])
    assert stop.value.code == 2 and "another benchmark or machine" in capsys.readouterr().err
    slow = plant(rows_at(1.0), commit="c")
    assert compare.main([str(slow), str(paths[0])]) == 1
    assert "SLOWER engine fp32" in capsys.readouterr().out
    assert compare.main([str(slow), str(slow)]) == 0


def test_what_is_stored_is_the_newest_committed_file_of_this_kind_of_machine(plant, folder):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True)

    new = plant(rows_at(1.0), date="2026-06-01")
    assert compare.report(read(new)) == (
        ["nothing stored of this kind of machine to compare with"], False,
    )  # fmt: skip
    git("init", "-q")
    plant(rows_at(1.0), commit="old")
    plant(rows_at(1.3), commit="mid", date="2026-02-01")
    plant(rows_at(9.0), commit="other", date="2026-03-01", processor={"name": "y"})
    git("add", ".")
    git("commit", "-qm", "results")
    plant(rows_at(1.0), commit="own", date="2026-05-01")  # not committed
    lines, slower = compare.report(read(new))
    assert slower and "2026-02-01-mid-encode.jsonl" in lines[0]
