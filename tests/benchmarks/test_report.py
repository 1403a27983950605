"""The README's figures are those of the committed result files."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import report

README = Path(report.ROOT) / "README.md"


def test_the_readme_shows_what_the_result_files_say():
    text = README.read_text()
    assert report.fill(text) == text, "run: python -P benchmarks/report.py"


def test_a_changed_figure_is_noticed():
    _, result = report.newest("cpu", "encode")
    shown = f"{result['rows'][0]['images_per_second']:.2f}"
    text = README.read_text()
    assert shown in text
    assert report.fill(text.replace(shown, "999.99")) == text


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


def timing(name: str, batch: int, seconds: float, **facts: object) -> dict:
    spread = {"median": seconds, "low": seconds * 0.9, "high": seconds * 1.1, "rounds": 5}
    base = {"name": name, "model": "m", "batch": batch, "speedup": 0.2 * batch / seconds}
    return {**base, **spread, "images_per_second": batch / seconds, **facts}


RESULT = {
    "date": "2026-01-01",
    "commit": "abc",
    "versions": {"torch": "2", "openvino": "3"},
    "processor": {
        "name": "x", "family": 6, "model": 1, "threads": 2, "bf16_matrix_units": False,
    },
    "baseline": "reference fp32 eager",
    "plan": {"1": {"sets": 8, "rounds": 7}, "8": {"sets": 2, "rounds": 5}},
    "load_average_before": [0.25, 0, 0],
    "skipped": {"ONNX Runtime fp32": "onnxruntime is not installed"},
    "rows": [
        timing("reference fp32 eager", 1, 0.2),
        timing("engine fp32", 1, 0.1),
        timing("OpenVINO fp32", 1, 0.4, prepare_seconds=5.4),
        timing("reference fp32 eager", 8, 1.6),
        timing("engine fp32", 8, 0.8),
        {"name": "OpenVINO fp32", "model": "m", "batch": 8, "refused": "cls: error 2 exceeds 1"},
    ],
    "latency": [{"name": "engine fp32", "median": 0.1, "p99": 0.13, "calls": 321}],
    "footprint": [{"name": "engine fp32", "load_seconds": 1.25, "peak_mib": 900}],
}  # fmt: skip


@pytest.fixture
def stored(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    (folder / "2026-01-01-abc-encode.json").write_text(json.dumps(RESULT))


def test_the_table_has_a_row_an_implementation_and_says_who_was_refused_or_absent(stored):
    lines = report.cpu_encode().splitlines()
    assert lines[0] == "| images/s | batch 1 | batch 8 | prepared in |"
    assert lines[2] == (
        "| engine fp32 | 10.00 (9.09 to 11.11), 2.00x | 10.00 (9.09 to 11.11), 2.00x |  |"
    )
    assert lines[4] == "| OpenVINO fp32 | 2.50 (2.27 to 2.78), 0.50x | refused | 5 s |"
    text = "\n".join(lines)
    assert "OpenVINO fp32 at batch 8 was refused a figure: cls: error 2 exceeds 1." in text
    assert "ONNX Runtime fp32 was skipped: onnxruntime is not installed." in text
    assert "| engine fp32 | 100 ms, 130 ms over 321 calls | 1.25 s | 900 MiB |" in text
    assert "7, 5 alternated rounds at batch 1, 8" in text and "load average 0.25" in text


def test_every_plot_is_a_picture_with_every_label_inside(stored, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.main(["--plots", str(tmp_path / "plots")]) == 0
    for name in ("cpu-throughput", "cpu-by-batch"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        figure = report.PLOTS[name]()
        figure.canvas.draw()
        box, renderer = figure.bbox, figure.canvas.get_renderer()
        labels = [axis.title for axis in figure.axes] + [
            label for axis in figure.axes for label in axis.get_yticklabels()
        ]
        labels += [label for legend in figure.legends for label in legend.get_texts()]
        for label in labels:
            extent = label.get_window_extent(renderer)
            assert box.x0 <= extent.x0 and extent.x1 <= box.x1, label.get_text()
    shown = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert shown == {row["name"] for row in RESULT["rows"]}


def test_error_bars_are_the_quartiles(stored):
    pytest.importorskip("matplotlib")
    (axis,) = report.PLOTS["cpu-throughput"]().axes
    bars = {c.get_label(): c.lines[2][0].get_segments() for c in axis.containers}
    assert [pair[:, 1].tolist() for pair in bars["engine fp32"]] == [
        pytest.approx([1 / 0.11, 1 / 0.09]),
        pytest.approx([8 / 0.88, 8 / 0.72]),
    ]
    assert len(bars["OpenVINO fp32"]) == 1  # the refused one has no point


def test_a_module_of_others_adds_its_tables_and_plots(monkeypatch):
    other = ModuleType("report_gpu")
    other.TABLES, other.PLOTS = {"gpu": lambda: "a table"}, {"roofline": lambda: None}
    tables, plots = {}, {}
    monkeypatch.setitem(sys.modules, "report_gpu", other)
    report.add_others(tables, plots, ("report_gpu", "no_such_module"))
    assert set(tables) == {"gpu"} and set(plots) == {"roofline"}
    monkeypatch.setattr(report, "TABLES", tables)
    filled = report.fill("<!-- table: gpu -->\nold\n<!-- end: gpu -->")
    assert filled == "<!-- table: gpu -->\na table\n<!-- end: gpu -->"
