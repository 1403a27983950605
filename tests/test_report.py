"""The README's figures are those of the committed result files."""

import json
from pathlib import Path

import pytest
import report

README = Path(report.ROOT) / "README.md"


def test_the_readme_shows_what_the_result_files_say():
    text = README.read_text()
    assert report.fill(text) == text, "run: python -P benchmarks/report.py"


def test_a_changed_figure_is_noticed():
    _, result = report.newest("cpu", "encode")
    shown = f"{result['rows'][0]['images_per_second']:.1f}"
    text = README.read_text()
    assert report.fill(text.replace(shown, "999.9")) == text


def test_a_missing_marker_or_file_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="found 0"):
        report.fill("no markers")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="encode"):
        report.newest("cpu", "encode")


def test_the_newest_file_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    for date in ("2026-11-02", "2026-11-10", "2025-12-31"):
        path = tmp_path / "cpu" / f"{date}-abc-encode.json"
        path.write_text(json.dumps({"date": date}))
    assert report.newest("cpu", "encode")[1]["date"] == "2026-11-10"
    for commit, time in (("b", "09:30:00"), ("a", "10:00:00"), ("c", "09:59:59")):
        path = tmp_path / "cpu" / f"2026-11-10-{commit}-encode.json"
        path.write_text(json.dumps({"date": "2026-11-10", "time": time}))
    assert report.newest("cpu", "encode")[1]["time"] == "10:00:00"
