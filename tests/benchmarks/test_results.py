"""Result files: whole lines, jobs that were begun, which file goes on, whose figure is newest."""

import subprocess
import sys

import pytest
from harness import results
from harness.results import adding_to, going_on, lines_of, read

HEADER = {"name": "gpu", "device": "a GPU", "date": "2026-01-01", "commit": "abc", "sources": "s"}
ROW = {"stage": "ops", "key": "k", "name": "kernel", "median": 1.0}


def begin(key: str, stage: str = "ops") -> dict:
    return {"begin": key, "stage": stage, "limit": 9}


def test_a_job_that_was_begun_and_has_no_rows_has_failed(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(lines_of([HEADER, begin("k"), [ROW, ROW], begin("l")]))
    found = read(path)
    assert found.rows("ops", name="kernel") == [ROW, ROW] and found.has("ops", "k")
    assert not found.has("ops", "l") and "ended in this row" in found.jobs["ops", "l"][0]["failed"]
    assert found.begun == begin("l") and found.tried == {("ops", "k"), ("ops", "l")}
    again = {**HEADER, "date": "2026-01-02"}
    path.write_bytes(
        path.read_bytes() + lines_of([again, [{**ROW, "key": "l"}], {"finished": "ops"}])
    )
    found = read(path)
    assert found.has("ops", "l") and found.finished == {"ops"}
    assert not found.tried and found.begun is None, "another run has tried nothing yet"
    assert found.facts == HEADER and found.when == ("2026-01-02", "")


def test_a_line_cut_short_is_no_row_and_the_next_run_writes_over_it(tmp_path):
    path = tmp_path / "r.jsonl"
    whole = lines_of([HEADER, [ROW]])
    path.write_bytes(whole + b'[{"stage": "ops", "key": "l", "med')
    assert list(read(path).jobs) == [("ops", "k")]
    with adding_to(path, HEADER) as file:
        file.write(lines_of([[{**ROW, "key": "l"}]]))
    assert path.read_bytes() == whole + lines_of([HEADER, [{**ROW, "key": "l"}]])


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", "{\n", '{"rows": []}\n', "[1]\n", "7\n"])
def test_what_is_no_result_file_is_one_error(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.jsonl is no result file"):
        read(path)


def test_two_runs_never_write_into_one_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with adding_to(path, HEADER):
        with pytest.raises(BlockingIOError, match="another run"), adding_to(path, HEADER):
            pass
        before = path.read_bytes()
    assert before == lines_of([HEADER])


def start(place, header, *rows, **options):
    path = going_on(place, header, **options)
    with adding_to(path, header) as file:
        file.write(lines_of([[row] for row in rows]))
    return path


def test_a_run_goes_on_past_midnight_and_from_another_folder(folder, tmp_path):
    home = folder / "a-gpu"
    first = start(home, HEADER, ROW)
    assert first == home / "2026-01-01-abc.jsonl"
    later = {**HEADER, "date": "2026-01-02", "commit": "abd"}
    assert start(home, later, {**ROW, "key": "l"}) == first
    moved = start(tmp_path / "out" / "a-gpu", later)  # as where only some folder comes back
    assert moved == tmp_path / "out" / "a-gpu" / first.name
    assert list(read(moved).jobs) == [("ops", "k"), ("ops", "l")]
    assert [run["date"] for run in read(moved).runs] == ["2026-01-01", "2026-01-02", "2026-01-02"]


def test_other_sources_other_devices_and_fresh_runs_start_anew(folder):
    home = folder / "a-gpu"
    first = start(home, HEADER, ROW)
    for header, options in (
        ({**HEADER, "sources": "t"}, {}),
        ({**HEADER, "device": "b"}, {}),
        (HEADER, {"fresh": True}),
    ):
        path = start(home, header, **options)
        assert path != first and not read(path).jobs
        path.unlink()
    with pytest.raises(ValueError, match=r"was measured with sources 's', this is 't'"):
        going_on(home, {**HEADER, "sources": "t"}, resume=first)
    assert going_on(home, HEADER, resume=first) == first


def test_code_is_known_by_its_sources_where_there_is_no_git(folder, monkeypatch):
    (results.ROOT / "kernels" / "tuned").mkdir(parents=True)
    seen = {results.sources()}
    for name in ("kernels/a.py", "kernels/tuned/sm_90.json", "benchmarks/b.py"):
        (results.ROOT / name).write_text("x")
        seen.add(results.sources())
    (results.ROOT / "benchmarks" / "README.md").write_text("no code")
    assert len(seen) == 4 and results.sources() in seen
    assert results.commit() == f"sources-{results.sources()}"


def test_the_commit_is_dirty_where_code_differs_from_it(folder):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(results.ROOT), *who, *arguments], check=True)

    git("init", "-q")
    code = results.ROOT / "kernels" / "x" / "a.py"
    code.parent.mkdir(parents=True)
    code.write_text("x")
    git("add", ".")
    git("commit", "-qm", "x")
    clean = results.commit()
    (results.RESULTS / "r.jsonl").write_text("x")
    assert results.commit() == clean and "-" not in clean
    code.write_text("y")
    assert results.commit() == f"{clean}-dirty"


def test_the_newest_of_each_kind_of_machine(plant):
    other = {"name": "y", "threads": 2}
    for date, time, facts in (
        ("2026-11-02", "09:00:00", {}),
        ("2026-11-10", "09:30:00", {"commit": "b"}),
        ("2026-11-10", "10:00:00", {"commit": "a"}),
        ("2025-12-31", "11:00:00", {"processor": other}),
        ("2027-01-01", "11:00:00", {"name": "ops"}),
    ):
        plant([ROW], date=date, time=time, **facts)
    found = [result.when for result in results.newest_of_each_kind("encode")]
    assert found == [("2026-11-10", "10:00:00"), ("2025-12-31", "11:00:00")]


def test_a_result_says_where_and_how_it_was_measured(folder):
    facts = results.facts("encode", "a command", processor=results.processor())
    found = read(results.write("cpu", facts, [ROW]))
    assert {"date", "time", "commit", "sources", "command"} <= set(found.facts)
    assert found.facts["versions"]["python"] == sys.version.split()[0]
    assert found.facts["processor"]["threads"] > 0
    assert [path.name for path in (folder / "cpu").iterdir()] == [found.path.name]


def test_what_the_newest_file_lacks_is_an_older_ones_of_the_same_device(tmp_path):
    def file(name: str, device: str, *jobs: list) -> results.Result:
        path = tmp_path / name
        facts = {"name": "gpu", "date": "2026-01-01", "commit": name, "device": device}
        path.write_bytes(lines_of([facts, *jobs]))
        return read(path)

    def job(key: str, **facts: object) -> list[dict]:
        return [{"stage": "encode", "key": key, "name": "engine", **facts}]

    new = file("new", "x", job("a", median=1.0), job("b", failed="why"))
    old = file("old", "x", job("a", median=2.0), job("b", median=3.0), job("c", failed="why"))
    other = file("other", "y", job("c", median=4.0))
    found = results.with_older([new, old, other])
    assert found.facts["commit"] == "new"
    assert found.jobs["encode", "a"] == job("a", median=1.0)
    assert found.jobs["encode", "b"] == job("b", median=3.0, of_commit="old")
    assert ("encode", "c") not in found.jobs
    assert results.with_older([]) is None
