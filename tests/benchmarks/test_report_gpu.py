"""Tables and plots of GPU result files, from files planted here."""

import json

import gpu_results
import pytest
import report
import report_gpu

PARTS = {
    "ceilings": [
        {"key": "bf16", "tflops": 800.0}, {"key": "fp8", "tflops": 1400.0},
        {"key": "copy", "gb_per_second": 4000.0},
    ],
    "tests": [{"key": "tests", "summary": "31 passed", "exit": 0}],
    "audit": [{"key": "audit", "summary": "80 kernels, 0 with violations", "exit": 0}],
}  # fmt: skip
FLOPS = 357e9


def timing(seconds: float, batch: int = 1) -> dict:
    spread = {"median": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds}
    return {**spread, "rounds": 9, "images_per_second": batch / seconds}


def encoded(model: str, batch: int, precision: str, seconds: float, **facts: object) -> dict:
    return {
        "key": f"{model}/b{batch}/{precision}", "model": model, "batch": batch,
        "precision": precision, "flops": FLOPS * batch, "bytes": 1e9,
        "engine": timing(seconds, batch), **facts,
    }  # fmt: skip


def op(name: str, seconds: float, batch: int = 64, **facts: object) -> dict:
    return {
        "key": f"stellar-h16/b{batch}/bf16/{name}", "precision": "bf16", "batch": batch,
        "ours": "kernel", "flops": 8e9, "bytes": 1e8, "kernel": timing(seconds), **facts,
    }  # fmt: skip


def switched(name: str, batch: int, ratio: float, **facts: object) -> dict:
    row = {
        "key": f"stellar-h16/b{batch}/bf16/{name}", "model": "stellar-h16", "batch": batch,
        "precision": "bf16", "switch": name, "what": f"the {name}", "instead": "nothing",
    }  # fmt: skip
    times = {"full": timing(0.03), "without": timing(0.03 * ratio), "ratio": ratio}
    return {**row, **(facts or times)}


ALL = {
    **PARTS,
    "encode": [
        encoded("stellar-h16", 64, "bf16", 0.032, eager_fp32=timing(0.4, 64), load_seconds=9.0),
        encoded("stellar-h16", 64, "fp8", 0.025, eager_fp32=timing(0.4, 64)),
        encoded("stellar-h16", 1, "bf16", 0.001, latency_median=0.00123, latency_p99=0.0015),
        encoded("stellar-b8", 8, "bf16", 0.004, eager_fp32=timing(0.036, 8)),
        {"key": "stellar-l16/b64/fp8", "refused": "cls: error 2e-01 exceeds 1e-01"},
        {"key": "stellar-b16/b64/fp8", "failed": "RuntimeError: an error | of two lines\nx"},
    ],
    "compile": [
        {
            "key": "stellar-h16/b64/compile", "model": "stellar-h16", "batch": 64,
            "engine_bf16": timing(0.033), "engine_fp8": timing(0.0256), "compile": timing(0.0462),
            "compile_seconds": 80.0,
        },
    ],
    "ops": [
        op("qkv", 20e-6, eager=timing(80e-6), not_run={"sdpa cudnn": "no kernel"}),
        op("qkv/compile", 22e-6, **{"torch.compile": timing(44e-6)}, compile_mode="max-autotune-x"),
        op("norm", 50e-6, flops=1e6, eager=timing(75e-6)),
        op("qkv", 2e-6, batch=1),
        op("spatial_map", 40e-6),
        {"key": "stellar-h16/b64/bf16/fc1", "precision": "bf16", "refused": "result 0: error 1"},
    ],
    "waterfall": [
        switched("gelu", 64, 1.05), switched("fp8", 64, 1.5), switched("gelu", 1, 1.1),
        switched("norm", 64, 1.0, refused="without: cls: error"),
    ],
    "sweep": [
        encoded(model, batch, precision, batch * cost + 2e-4)
        for model in ("stellar-h16", "stellar-b16")
        for precision, cost in (("bf16", 6e-4), ("fp8", 4e-4))
        for batch in (1, 8, 64, 512)
    ],
    "curves": [
        {**encoded("stellar-b16", 64, "bf16", side / 1e4), "side": side, "tokens": 16}
        for side in (224, 384, 512)
    ] + [{**encoded("stellar-b8", 64, "bf16", 0.02), "side": 224, "tokens": 8}],
}  # fmt: skip
PREDICTED = {
    "name": "predicted", "date": "2026-01-01", "time": "00:00:00", "commit": "abc",
    "versions": {"triton": "3"},
    "chips": {"90": {"name": "H200", "matrix": 790e12, "copy": 4.3e12, "source": "seen"}},
    "results": [
        {
            "arch": 90, "model": "stellar-h16", "precision": "bf16", "batch": batch,
            "seconds": seconds, "floor": seconds / 2, "images_per_second": batch / seconds,
            "rows": [
                {"op": "sparse_proj", "seconds": 9e-6}, {"op": "qkv", "seconds": 25e-6},
                {"op": "sparse_proj", "seconds": 5e-6}, {"op": "similarity", "seconds": 20e-6},
                {"op": "spatial", "seconds": 7e-6},
            ],
        }
        for batch, seconds in ((1, 0.002), (64, 0.036), (512, 0.3), (7, 0.01))
    ],
}  # fmt: skip


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Writes a result file of these parts."""
    results = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(gpu_results, "RESULTS", results)
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def write(parts: dict, device: str = "NVIDIA H200", **facts: object) -> None:
        folder = results / "nvidia-h200"
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "name": "gpu", "device": device, "date": "2026-01-02", "time": "10:00:00",
            "commit": "abc", "command": "python -P benchmarks/gpu.py",
            "versions": {"torch": "2", "triton": "3"},
            "runs": [{"date": day, "time": "10:00:00"} for day in ("2026-01-02", "2026-01-03")],
            "rows": [{"part": part, **row} for part, rows in parts.items() for row in rows],
            **facts,
        }  # fmt: skip
        name = f"{content['date']}-{content['commit']}.json"
        (folder / name).write_text(json.dumps(content))

    return write


@pytest.fixture
def predicted(plant):
    folder = gpu_results.RESULTS / "predicted"
    folder.mkdir(parents=True)
    (folder / "2026-01-01-abc.json").write_text(json.dumps(PREDICTED))
    older = {**PREDICTED, "date": "2025-01-01", "results": []}
    (folder / "2025-01-01-zzz.json").write_text(json.dumps(older))


def line(table: str, start: str) -> list[str]:
    (found,) = (row for row in table.splitlines() if row.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_without_a_file_every_table_is_one_sentence_and_no_plot_is_drawn(plant):
    for name in ("gpu-goals", "gpu-encode", "gpu-kernels", "gpu-waterfall"):
        text = report_gpu.TABLES[name]()
        assert text.startswith("Nothing has been measured on a GPU yet")
        assert text.count(".") == 1 and "\n" not in text
    assert all(plot() is None for plot in report_gpu.PLOTS.values())


def test_a_file_of_ceilings_alone_draws_nothing_and_claims_nothing(plant):
    plant(PARTS)
    assert all(plot() is None for plot in report_gpu.PLOTS.values())
    assert "No kernel was timed" in report_gpu.kernels()
    assert "No engine was timed" in report_gpu.encode()
    assert "No optimisation was switched off" in report_gpu.waterfall()
    rows = [row for row in report_gpu.goals().splitlines() if row.startswith("| ")][1:]
    found = [row for row in rows if not row.endswith("| | |")]
    assert len(found) == 1 and "0 with violations" in found[0], "the audit is all that ran"


def test_goals_are_met_or_missed_by_the_arithmetic_of_the_rows(plant):
    plant(ALL)
    table = report_gpu.goals()
    share = FLOPS * 64 / 0.032 / 800e12
    assert line(table, "H/14, batch 64, bf16: of")[1:] == [
        "at least 85%", f"{share:.0%}", f"{share / 0.85:.2f}", "yes",
    ]  # fmt: skip
    assert line(table, "H/14, batch 64, bf16 |")[2:] == ["2,000 images/s", "1.06", "yes"]
    assert line(table, "the same against torch.compile")[2:] == ["1.40x", "1.08", "yes"]
    assert line(table, "H/14, batch 64, fp8")[2:] == ["2,560 images/s", "0.85", "no"]
    assert line(table, "the same against that")[2:] == ["1.80x", "0.90", "no"]
    assert line(table, "H/14, one image, bf16")[1:] == [
        "at most 1.10 ms", "1.23 ms (99th percentile 1.50 ms)", "0.89", "no",
    ]  # fmt: skip
    eager = line(table, "any model")
    assert eager[2].startswith("9.00x (stellar-b8, batch 8, bf16; the least of 3 points, 2 of 5")
    assert eager[3:] == ["0.90", "no"]
    assert line(table, "L/16")[2:] == ["refused: cls: error 2e-01 exceeds 1e-01", "", ""]
    assert line(table, "B/16, batch 64, fp8")[2] == "failed: RuntimeError: an error / of two lines"
    assert line(table, "H/14, one image, fp8")[2:] == ["not measured", "", ""]
    assert "(4 of 5 rows" not in table and line(table, "rows whose error")[4] == "no"
    assert line(table, "CPU with")[2] == "not measured: no CPU with bf16 matrix units was at hand"
    assert "2026-01-02 and 2026-01-03, commit abc" in table and "31 passed" in table
    assert "nvidia-h200/2026-01-02-abc.json" in table


def test_figures_of_red_tests_or_of_no_commit_do_not_count(plant):
    red = {"key": "tests", "summary": "1 failed", "failed": "FAILED tests/test_x.py"}
    plant({**ALL, "tests": [red]})
    assert line(report_gpu.goals(), "H/14, batch 64, bf16 |")[4] == "does not count: tests red"
    assert "RED: 1 failed" in report_gpu.goals()
    plant({**ALL, "tests": []})
    assert line(report_gpu.goals(), "H/14, batch 64, bf16 |")[4] == "does not count: tests not run"
    plant(ALL, commit="abc-dirty", date="2027-01-01", runs=[])
    assert line(report_gpu.goals(), "H/14, batch 64, bf16 |")[4] == "does not count: not a commit"


def test_a_compiler_that_did_not_finish_leaves_the_goal_open(plant):
    row = {"key": "stellar-h16/b64/compile", "not_run": {"compile": "did not finish within 9 s"}}
    plant({**ALL, "compile": [row]})
    cells = line(report_gpu.goals(), "the same against torch.compile")
    assert cells[2:] == ["not measured: did not finish within 9 s", "", ""]


@pytest.mark.parametrize("units", [True, False])
def test_goals_of_cpus_count_on_those_with_matrix_units(plant, units):
    plant(ALL)
    folder = gpu_results.RESULTS / "cpu"
    folder.mkdir()
    rows = [
        {"name": name, "batch": batch, "median": seconds}
        for batch in (1, 8)
        for name, seconds in (
            ("engine bf16", 0.1), ("reference fp32 eager", 0.75), ("OpenVINO bf16", 0.13),
        )
    ]  # fmt: skip
    result = {
        "name": "encode", "date": "2026-01-01", "rows": rows,
        "processor": {"bf16_matrix_units": units},
    }  # fmt: skip
    (folder / "x-encode.json").write_text(json.dumps(result))
    table = report_gpu.goals()
    if units:
        assert line(table, "CPU with")[2:] == ["7.50x", "1.07", "yes"]
        assert line(table, "the same against OpenVINO")[2:] == ["1.30x", "0.93", "no"]
        assert line(table, "the same at batch 1")[2:] == ["1.30x", "1.30", "yes"]
    else:
        assert line(table, "the same at batch 1")[2].startswith("not measured")


def test_the_engine_stands_beside_its_peers(plant):
    first = encoded(
        "stellar-h16", 64, "bf16", 0.032, eager_fp32=timing(0.4, 64), vit_bf16=timing(0.048, 64),
        not_run={"eager_bf16": "out of memory"}, peak_bytes=3 * 2**30, load_seconds=9.04,
        first_call_seconds=5.0, joules_per_image=0.35,
    )  # fmt: skip
    plant({**ALL, "encode": [first, *ALL["encode"][1:]]})
    table = report_gpu.encode()
    share = FLOPS * 64 / 0.032 / 800e12
    assert line(table, "stellar-h16 bf16, batch 64")[1:] == [
        "2,000 (1,667 to 2,222)", f"{share:.0%}", "12.50x, not run", "1.40x", "", "3,072 MiB",
        "9.0 s, 5.0 s", "350.0 mJ",
    ]  # fmt: skip
    assert line(table, "stellar-h16 fp8, batch 64")[4] == "1.80x"
    assert line(table, "stellar-h16 bf16, batch 1")[5] == "1.23 ms, 1.50 ms"
    assert line(table, "stellar-l16 fp8")[1:3] == ["refused", ""]
    assert "stellar-l16 fp8, batch 64 refused: cls: error 2e-01 exceeds 1e-01." in table
    assert "batch 64: 1.50x transformers ViTModel" in table
    assert "eager_bf16 did not run (out of memory)" in table
    assert "torch.compile of stellar-h16 at batch 64 took 80 s." in table
    rows = [row for row in table.splitlines() if row.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1, "a rectangle"


def test_kernels_stand_beside_floors_predictions_and_rivals(plant, predicted):
    plant(ALL)
    table = report_gpu.kernels()
    assert line(table, "stellar-h16 qkv, batch 64")[1:] == [
        "20.0 µs", "25.0 µs (bytes)", "125%", "25.0 µs (1.25x)",
        "eager 4.00x; torch.compile 2.00x; sdpa cudnn did not run",
    ]  # fmt: skip
    assert line(table, "stellar-h16 norm")[1:] == [
        "50.0 µs", "25.0 µs (bytes)", "50%", "", "eager 1.50x",
    ]  # fmt: skip
    assert line(table, "stellar-h16 spatial_map")[4] == "32.0 µs (0.80x)", "three launches"
    assert line(table, "stellar-h16 fc1")[1] == "refused: result 0: error 1"
    assert "PREDICTED" in table.splitlines()[0] and "mode max-autotune-x" in table
    plant(ALL, device="NVIDIA A100", date="2027-01-01", runs=[])
    table = report_gpu.kernels()
    assert line(table, "stellar-h16 qkv, batch 64")[4] == "", "predicted for an H200"


def test_predictions_are_labelled_and_held_against_what_was_measured(plant, predicted):
    table = report_gpu.predicted()
    assert table.startswith("| PREDICTED, not measured |")
    assert line(table, "stellar-h16 bf16, batch 64")[1:] == [
        "36 ms", "1,780", "18 ms", "not measured", "",
    ]  # fmt: skip
    plant(ALL)
    table = report_gpu.predicted()
    assert line(table, "stellar-h16 bf16, batch 64")[4:] == ["32 ms", "+12%"]
    assert line(table, "stellar-h16 bf16, batch 512")[4] == "307 ms", "of the sweep"
    assert line(table, "stellar-h16 bf16, batch 7")[4] == "not measured"


def test_the_waterfall_is_sorted_by_what_it_brings(plant):
    plant(ALL)
    table = report_gpu.waterfall()
    rows = [row.split(" | ")[0] for row in table.splitlines()[2:5]]
    assert rows == ["| the fp8", "| the gelu", "| the norm"]
    assert line(table, "the gelu")[2:] == ["30.00 to 31.50 ms, 1.05x", "30.00 to 33.00 ms, 1.10x"]
    assert line(table, "the norm")[2:] == ["refused", ""]


def test_every_plot_is_drawn_with_its_labels_inside(plant, tmp_path):
    pytest.importorskip("matplotlib")
    plant(ALL)
    for name, plot in report_gpu.PLOTS.items():
        figure = plot()
        figure.savefig(tmp_path / f"{name}.png", dpi=80)
        box, renderer = figure.bbox, figure.canvas.get_renderer()
        labels = [axis.title for axis in figure.axes]
        labels += [text for legend in figure.legends for text in legend.get_texts()]
        labels += [text for axis in figure.axes for text in axis.get_yticklabels()]
        for label in filter(lambda text: text.get_text(), labels):
            extent = label.get_window_extent(renderer)
            assert box.x0 <= extent.x0 and extent.x1 <= box.x1, (name, label.get_text())


def test_the_roofline_has_every_kernel_and_the_ceilings(plant):
    pytest.importorskip("matplotlib")
    plant(ALL)
    (axis,) = report_gpu.PLOTS["gpu-roofline"]().axes
    points = {
        (round(x, 3), round(y, 3))
        for found in axis.lines
        if len(found.get_xdata()) == 1
        for x, y in [(found.get_xdata()[0], found.get_ydata()[0])]
    }
    assert points == {(80.0, 400.0), (80.0, 4000.0), (80.0, 200.0), (0.01, 0.02)}
    roof = next(found for found in axis.lines if len(found.get_xdata()) == 3)
    assert list(roof.get_ydata())[1:] == [800.0, 800.0] and roof.get_xdata()[1] == 200.0


def test_throughput_has_peers_and_ceilings(plant):
    pytest.importorskip("matplotlib")
    plant(ALL)
    figure = report_gpu.PLOTS["gpu-throughput"]()
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {
        "engine bf16", "engine fp8", "eager fp32", "torch.compile max-autotune bf16",
        "bf16 matrix ceiling", "fp8 matrix ceiling",
    }  # fmt: skip
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["stellar-b16", "stellar-h16", "stellar-b8"]
