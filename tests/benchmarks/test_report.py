"""The README's figures are those of the result files; the CPU's tables and its picture."""

import xml.etree.ElementTree

import pytest
from harness import results
from harness.results import ROOT, newest_of_each_kind
from report import cpu, extraction, run


def test_the_readmes_and_the_picture_show_what_the_result_files_say():
    for path, text in run.files():
        assert path.read_text() == text, "run: python -P benchmarks/report/run.py"
    assert (ROOT / "benchmarks" / "README.md").read_text().count("<!-- table") == len(run.TABLES)


def test_a_changed_figure_or_marker_is_noticed():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    row = newest_of_each_kind("encode")[0].rows("encode")[0]
    shown = f"{row['images_per_second']:.2f} ("
    assert shown in text and run.fill(text.replace(shown, "999.99 (")) == text
    with pytest.raises(ValueError, match="no table 'none'"):
        run.fill("<!-- table: none -->\n<!-- end: none -->")


def test_the_command_writes_and_checks_and_misses_no_table(plant, capsys):
    markers = "".join(f"<!-- table: {name} -->\n<!-- end: {name} -->\n" for name in run.TABLES)
    (results.ROOT / "README.md").write_text("no table")
    readme = results.ROOT / "benchmarks" / "README.md"
    readme.write_text(markers)
    assert run.main(["--check"]) == 1 and readme.read_text() == markers
    assert run.main([]) == 0 and run.main(["--check"]) == 0
    assert "Nothing has been measured on a CPU." in readme.read_text()
    readme.write_text(markers.replace("cpu-ops", "cpu-encode"))
    with pytest.raises(ValueError, match="lacks the markers of cpu-ops"):
        run.main([])


def test_the_table_has_a_row_an_implementation_and_says_who_has_no_figure(stored):
    lines = cpu.TABLES["cpu-encode"]().splitlines()
    assert lines[0] == "| images/s | batch 1 | batch 8 | error | prepared in |"
    assert lines[2] == (
        "| engine fp32 | 10.00 (9.09 to 11.11), 2.00x | 10.00 (9.09 to 11.11), 2.00x | 2.0e-06 |  |"
    )
    assert lines[4] == "| OpenVINO fp32 | 2.50 (2.27 to 2.78), 0.50x | refused | 2.0e-06 | 5 s |"
    text = "\n".join(lines)
    assert "OpenVINO fp32 at batch 8: refused: cls: error 2 exceeds 1." in text
    assert "ONNX Runtime fp32 at batch 1: not run: onnxruntime is not installed." in text
    assert "| engine fp32 | 100 ms, 130 ms over 321 calls | 1.25 s | 2.50 s | 900 MiB |" in text
    assert "7, 5 alternated rounds at batch 1, 8" in text and "load average 0.25" in text
    assert "commit abc" in text and "commit old" not in text


def test_extraction_is_told_by_its_newest_files():
    text = extraction.TABLES["cpu-extract"]()
    told = {
        "extract": lambda facts: f"at {facts['fed']['median']:.3f} of its rate",
        "scaled": lambda facts: f"{facts['faster']['median']:.2f} times as fast",
    }
    for name, tells in told.items():
        for result in newest_of_each_kind(name):
            assert result.path.name in text and tells(result.facts) in text
            for row in result.rows(name):
                assert f"{row['name']} | {row['images_per_second']:.1f} |" in text


def test_every_kind_of_processor_has_its_newest_result(stored):
    other = {"name": "y", "family": 1, "model": 2, "threads": 8, "bf16_matrix_units": True}
    stored(processor=other, commit="def", date="2025-06-01")
    text = cpu.TABLES["cpu-encode"]()
    assert text.count("| images/s |") == 2 and text.index("commit abc") < text.index("commit def")
    table = cpu.TABLES["figures"]().splitlines()
    assert table[2:5] == [
        "| engine fp32 | 10.00 | 10.00 |", "| reference fp32 eager | 5.00 | 5.00 |",
        "| OpenVINO fp32 | 2.50 |  |",
    ]  # fmt: skip


def test_the_picture_has_a_bar_a_figure_as_long_as_it_is_fast(stored):
    (newest,) = newest_of_each_kind("encode")
    root = xml.etree.ElementTree.fromstring(run.throughput(cpu.chosen(newest), newest))
    space = "{http://www.w3.org/2000/svg}"
    bars = [int(bar.get("width")) for bar in root.iter(f"{space}rect")]
    assert [round(bar / bars[0], 2) for bar in bars] == [1.0, 0.5, 0.25, 1.0, 0.5]
    width = float(root.get("viewBox").split()[2])
    for text in root.iter(f"{space}text"):
        if text.get("text-anchor") is None:
            assert float(text.get("x")) + 7 * len(text.text) < width, text.text
    assert "prefers-color-scheme: dark" in root.find(f"{space}style").text


def test_ops_stand_beside_their_rivals(plant, spread):
    def op(name: str, batch: int, seconds: float, **facts: object) -> dict:
        key = f"stellar-b16/b{batch}/fp32/qkv"
        place = {"stage": "ops", "key": key, "model": "stellar-b16", "batch": batch, "op": "qkv"}
        return {**place, "precision": "fp32", "name": name, **spread(seconds), **facts}

    floor = {"of_floor": 0.8, "bound": "flops"}
    wrong = op("engine", 1, 1, refused="x")
    rows = [op("engine", 8, 0.002, **floor), op("eager", 8, 0.003), wrong, op("eager", 1, 1e-4)]
    plant(rows, name="ops")
    lines = cpu.TABLES["cpu-ops"]().splitlines()
    assert lines[2] == "| qkv fp32 | 2.0 ms (1.8 ms to 2.2 ms) | 80% by flops | 1.50x |  |  |"
    assert lines[6] == "| qkv fp32 | refused |"
