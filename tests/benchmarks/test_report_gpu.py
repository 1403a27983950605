"""Tables of a GPU's results and of predictions, and the plots, from files planted here."""

import pytest
from harness import results
from report import gpu, run

from stellar_fast.config import MODELS

H = "stellar-h16"
FLOPS = 357e9


@pytest.fixture
def measured(plant, spread):
    """Writes a result file of a GPU that has these stages, the others as they are here."""

    def encoded(model: str, batch: int, precision: str, seconds: float, **facts: object) -> dict:
        rate = {**spread(seconds), "images_per_second": batch / seconds}
        key = f"{model}/b{batch}/{precision}"
        row = {"key": key, "model": model, "batch": batch, "precision": precision, **rate}
        own = {"name": f"engine {precision}", "flops": FLOPS * batch, "bytes": 1e9}
        return {**row, **own, "of_ceiling": FLOPS * batch / seconds / 800e12, **facts}

    def rival(row: dict, seconds: float, name: str = "reference fp32 eager") -> dict:
        names = ("key", "model", "batch", "precision")
        common = {"name": name, **{field: row[field] for field in names}}
        return {**common, **spread(seconds), "images_per_second": row["batch"] / seconds}

    def op(name: str, seconds: float, who: str = "kernel", **facts: object) -> dict:
        key = f"{H}/b64/bf16/{name}"
        place = {"key": key, "model": H, "batch": 64, "precision": "bf16", "op": name}
        own = (
            {"flops": 8e9, "bytes": 1e8, "floor": 25e-6, "bound": "bytes"}
            if who == "kernel"
            else {}
        )
        own |= {"of_floor": 25e-6 / seconds} if own else {}
        return {**place, "name": who, **spread(seconds), **own, **facts}

    def switched(name: str, batch: int, ratio: float) -> list[dict]:
        row = {"key": f"{H}/b{batch}/bf16/{name}", "model": H, "batch": batch, "precision": "bf16"}
        row |= {"switch": name, "what": f"the {name}", "instead": "nothing"}
        times = {"engine": 0.03, "engine without": 0.03 * ratio}
        return [{**row, "name": who, **spread(taken)} for who, taken in times.items()]

    big, small = encoded(H, 64, "bf16", 0.032, load_seconds=9.0), encoded(H, 64, "fp8", 0.025)
    b8 = encoded("stellar-b8", 8, "bf16", 0.004)
    late = {"latency_median": 0.00123, "latency_p99": 0.0015}
    compiled = encoded(H, 64, "bf16", 0.033, key=f"{H}/b64/compile")
    stages = {
        "ceilings": [{"key": "bf16", "rate": 800e12}, {"key": "fp8", "rate": 1400e12},
                     {"key": "copy", "rate": 4e12}],
        "tests": [{"key": "tests", "summary": "31 passed", "exit": 0}],
        "audit": [{"key": "audit", "summary": "80 kernels, 0 with violations", "exit": 0}],
        "encode": [
            big, rival(big, 0.4), rival(big, 0.048, results.VIT_BF16),
            {**rival(big, 1.0, results.EAGER_BF16), "not_run": "out of memory"},
            small, rival(small, 0.4), encoded(H, 1, "bf16", 0.001, **late), b8, rival(b8, 0.036),
            {"key": "stellar-l16/b64/fp8", "refused": "cls: error 2e-01 exceeds 1e-01"},
            {"key": "stellar-b16/b64/fp8", "failed": "RuntimeError: an error | of two lines\nx"},
        ],
        "compile": [
            compiled, {**compiled, "name": "engine fp8", **spread(0.0256)},
            {**rival(compiled, 0.0462, results.COMPILED_BF16), "compile_seconds": 80.0},
        ],
        "ops": [
            op("qkv", 20e-6), op("qkv", 80e-6, "eager"),
            {**op("qkv", 1, "sdpa cudnn"), "not_run": "no kernel"},
            op("qkv", 22e-6, key=f"{H}/b64/bf16/qkv/compile"),
            op("qkv", 44e-6, "torch.compile", key=f"{H}/b64/bf16/qkv/compile", compile_mode="max"),
            op("norm", 50e-6), op("spatial_map", 40e-6),
            {"key": f"{H}/b64/bf16/fc1", "refused": "result 0: error 1"},
        ],
        "waterfall": [
            *switched("gelu", 64, 1.05), *switched("fp8", 64, 1.5), *switched("gelu", 1, 1.1),
            {**switched("norm", 64, 1.0)[1], "refused": "cls: error"},
        ],
        "sweep": [
            encoded(model, batch, "bf16", 6e-4 * batch + 2e-4)
            for model in MODELS for batch in (1, 8, 512)
        ],
        "curves": [encoded("stellar-b16", 64, "bf16", side / 1e4, side=side, tokens=16,
                           key=f"stellar-b16/b64/bf16/{side}") for side in (224, 384)],
    }  # fmt: skip

    def write(**others: object) -> None:
        named = {name: others.pop(name) for name in list(others) if name in stages}
        rows = [
            {"name": "engine", "stage": stage, **row}
            for stage, found in (stages | named).items()
            for row in found
        ]
        facts = {"device": "NVIDIA H200", "command": "a command", "processor": {}}
        plant(rows, "nvidia-h200", **{**facts, "name": "gpu", **others})

    write.nothing = {name: [] for name in stages if name not in ("ceilings", "tests", "audit")}
    return write


def line(name: str, start: str) -> list[str]:
    table = gpu.TABLES[name]()
    (found,) = (row for row in table.splitlines() if row.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_without_a_file_every_table_is_one_sentence(folder):
    for name in gpu.TABLES:
        text = gpu.TABLES[name]()
        assert text.startswith("Nothing has been") and text.count(".") == 1 and "\n" not in text


def test_a_file_of_ceilings_alone_claims_nothing(measured):
    measured(**measured.nothing)
    assert "No kernel was timed" in gpu.TABLES["gpu-kernels"]()
    assert "No engine was timed" in gpu.TABLES["gpu-encode"]()
    assert "No optimisation was switched off" in gpu.TABLES["gpu-waterfall"]()
    rows = [r for r in gpu.TABLES["gpu-goals"]().splitlines() if r.startswith("| ")][2:]
    found = [row for row in rows if not row.endswith("|  |  |")]
    assert len(found) == 1 and "0 with violations" in found[0], "the audit is all that ran"


def test_goals_are_met_or_missed_by_the_arithmetic_of_the_rows(measured):
    measured()
    goal = lambda start: line("gpu-goals", start)  # noqa: E731
    share = FLOPS * 64 / 0.032 / 800e12
    assert goal("H/14, batch 64, bf16: of")[1:] == [
        "at least 85%", f"{share:.0%}", f"{share / 0.85:.2f}", "yes",
    ]  # fmt: skip
    assert goal("H/14, batch 64, bf16 |")[2:] == ["2,000 images/s", "1.06", "yes"]
    assert goal("the same against torch.compile")[2:] == ["1.40x", "1.08", "yes"]
    assert goal("H/14, batch 64, fp8")[2:] == ["2,560 images/s", "0.85", "no"]
    assert goal("the same against that")[2:] == ["1.80x", "0.90", "no"]
    assert goal("H/14, one image, bf16")[1:] == [
        "at most 1.10 ms", "1.23 ms (99th percentile 1.50 ms)", "0.89", "no",
    ]  # fmt: skip
    eager = goal("any model")
    assert eager[2].startswith("9.00x (stellar-b8, batch 8, bf16; the least of 3 points, 2 of ")
    assert eager[3:] == ["0.90", "no"]
    assert goal("L/16")[2:] == ["refused: cls: error 2e-01 exceeds 1e-01", "", ""]
    assert goal("B/16, batch 64, fp8")[2] == "failed: RuntimeError: an error / of two lines"
    assert goal("H/14, one image, fp8")[2:] == ["not measured", "", ""]
    assert goal("rows whose error")[4] == "no"
    assert goal("CPU with")[2] == "not measured: no CPU with bf16 matrix units was at hand"
    assert "commit abc" in gpu.TABLES["gpu-goals"]() and "31 passed" in gpu.TABLES["gpu-goals"]()


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"tests": [{"key": "tests", "summary": "1 failed", "failed": "FAILED x"}]}, "tests red"),
        ({"tests": []}, "tests not run"),
        ({"commit": "abc-dirty"}, "not a commit"),
        ({"commit": "sources-abc"}, "not a commit"),
    ],
)
def test_figures_of_red_tests_or_of_no_commit_do_not_count(measured, facts, why):
    measured(**facts)
    assert line("gpu-goals", "H/14, batch 64, bf16 |")[4] == f"does not count: {why}"
    assert ("RED: 1 failed" in gpu.TABLES["gpu-goals"]()) == (why == "tests red")


def test_a_compiler_that_did_not_finish_leaves_the_goal_open(measured):
    late = {"name": results.COMPILED_BF16, "key": f"{H}/b64/compile", "not_run": "within 9 s"}
    measured(compile=[late])
    cells = line("gpu-goals", "the same against torch.compile")
    assert cells[2:] == ["not measured: within 9 s", "", ""]


@pytest.mark.parametrize("units", [True, False])
def test_goals_of_cpus_count_on_those_with_matrix_units(measured, plant, units):
    measured()
    times = {"engine bf16": 0.1, "reference fp32 eager": 0.75, "OpenVINO bf16": 0.13}
    rows = [
        {"stage": "encode", "key": f"m/b{batch}", "name": name, "batch": batch, "median": seconds}
        for batch in (1, 8)
        for name, seconds in times.items()
    ]
    plant(rows, processor={"bf16_matrix_units": units})
    if units:
        assert line("gpu-goals", "CPU with")[2:] == ["7.50x", "1.07", "yes"]
        assert line("gpu-goals", "the same against OpenVINO")[2:] == ["1.30x", "0.93", "no"]
    else:
        assert line("gpu-goals", "the same at batch 1")[2].startswith("not measured")


def test_the_engine_stands_beside_its_peers(measured):
    measured()
    share = FLOPS * 64 / 0.032 / 800e12
    assert line("gpu-encode", f"{H} bf16, batch 64")[1:] == [
        "2,000 (1,818 to 2,222)", f"{share:.0%}", "12.50x, not run", "1.40x", "", "", "9.0 s", "",
    ]  # fmt: skip
    assert line("gpu-encode", f"{H} fp8, batch 64")[4] == "1.80x"
    assert line("gpu-encode", f"{H} bf16, batch 1 ")[5] == "1.23 ms, 1.50 ms"
    assert line("gpu-encode", "stellar-l16 fp8")[1:3] == ["refused", ""]
    table = gpu.TABLES["gpu-encode"]()
    assert "stellar-l16 fp8, batch 64 refused: cls: error 2e-01 exceeds 1e-01." in table
    assert "batch 64: 1.50x transformers ViTModel" in table
    assert "reference bf16 eager did not run (out of memory)" in table
    assert "torch.compile of stellar-h16 at batch 64: took 80 s." in table
    rows = [row for row in table.splitlines() if row.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1, "a rectangle"


@pytest.fixture
def predictions(plant):
    ops = {"qkv": 25e-6, "similarity": 20e-6, "spatial": 7e-6, "sparse_proj": 5e-6}
    rows = []
    for batch, seconds in ((64, 0.036), (512, 0.3), (7, 0.01)):
        job = {"stage": "predicted", "key": f"{H}/b{batch}", "model": H, "batch": batch}
        job |= {"precision": "bf16", "arch": 90}
        total = {"seconds": seconds, "floor": seconds / 2, "images_per_second": batch / seconds}
        rows.append({**job, "op": "forward", **total})
        rows.append({**job, "op": "sparse_proj", "seconds": 9e-6})  # of the last block's queries
        rows += [{**job, "op": op, "seconds": taken} for op, taken in ops.items()]
    chips = {"90": {"name": "H200", "matrix": 790e12, "copy": 4.3e12, "source": "seen"}}
    plant(rows, "predicted", name="predicted", chips=chips)


def test_kernels_stand_beside_floors_predictions_and_rivals(measured, predictions):
    measured()
    assert line("gpu-kernels", f"{H} qkv bf16")[1:] == [
        "20.0 µs", "25.0 µs (bytes)", "125%", "25.0 µs (1.25x)",
        "eager 4.00x; sdpa cudnn did not run; torch.compile 2.00x",
    ]  # fmt: skip
    assert line("gpu-kernels", f"{H} norm")[1:] == ["50.0 µs", "25.0 µs (bytes)", "50%", "", ""]
    assert line("gpu-kernels", f"{H} spatial_map")[4] == "32.0 µs (0.80x)", "three launches"
    assert line("gpu-kernels", f"{H} fc1")[1] == "refused: result 0: error 1"
    table = gpu.TABLES["gpu-kernels"]()
    assert "PREDICTED" in table.splitlines()[0] and "mode max" in table
    measured(device="NVIDIA A100", date="2027-01-01")
    assert line("gpu-kernels", f"{H} qkv bf16")[4] == "", "predicted for an H200"


def test_predictions_are_labelled_and_held_against_what_was_measured(measured, predictions):
    assert gpu.TABLES["predicted"]().startswith("| PREDICTED, not measured |")
    assert line("predicted", f"{H} bf16, batch 64")[1:] == [
        "36 ms", "1,780", "18 ms", "not measured", "",
    ]  # fmt: skip
    measured()
    assert line("predicted", f"{H} bf16, batch 64")[4:] == ["32 ms", "+12%"]
    assert line("predicted", f"{H} bf16, batch 512")[4] == "307 ms", "of the sweep"
    assert line("predicted", f"{H} bf16, batch 7")[4] == "not measured"


def test_kernels_that_were_not_measured_stand_beside_those_that_were(plant):
    assert gpu.TABLES["predicted-now"]().startswith("Nothing has been predicted")
    for name, seconds, date in (
        ("predicted", 2e-3, "2026-01-01"),
        ("predicted-unmeasured", 1.5e-3, "2026-01-02"),
    ):
        job = {"stage": "predicted", "key": "k", "model": H, "batch": 1, "precision": "bf16"}
        plant(
            [{**job, "arch": 90, "op": "forward", "seconds": seconds}], date, name=name, date=date
        )
    assert line("predicted-now", f"{H} bf16, batch 1")[1:] == ["2 ms", "1.5 ms", "-25%"]
    assert "PREDICTED" in gpu.TABLES["predicted-now"]().splitlines()[0]


def test_what_other_gpus_would_do_is_told_from_their_kernels(plant):
    job = {"stage": "predicted", "key": "k", "model": H, "batch": 1, "precision": "bf16"}
    job |= {"arch": 86, "chip": "A40"}
    total = {"seconds": 0.002, "floor": 0.0005, "images_per_second": 500.0}
    launches = [
        {
            "op": "qkv",
            "shared": 65536,
            "stack": 0,
            "before": 0,
            "each": 0,
            "after": 4,
            "under_way": 2,
        },
        {
            "op": "fc1",
            "shared": 98304,
            "stack": 8,
            "before": 1,
            "each": 0,
            "after": 2,
            "under_way": 1,
        },
        {
            "op": "norm",
            "shared": 0,
            "stack": 0,
            "before": 0,
            "each": 0,
            "after": 3,
            "under_way": None,
        },
    ]
    plant([{**job, "op": "forward", **total}, *({**job, **row} for row in launches)],
          "predicted", name="predicted", chips={})  # fmt: skip
    assert line("predicted-elsewhere", "sm_86, A40") == [
        "sm_86, A40", f"{H} bf16, batch 1", "2 ms", "25%", "96 KiB", "1 to 2",
        "0 to 1, 0, 2 to 4", "1",
    ]  # fmt: skip
    assert gpu.TABLES["predicted-elsewhere"]().startswith("| PREDICTED, not measured |")


def test_the_waterfall_is_sorted_by_what_it_brings(measured):
    measured()
    rows = [row.split(" | ")[0] for row in gpu.TABLES["gpu-waterfall"]().splitlines()[2:5]]
    assert rows == ["| the fp8", "| the gelu", "| the norm"]
    assert line("gpu-waterfall", "the gelu")[2:] == [
        "30.00 to 31.50 ms, 1.05x", "30.00 to 33.00 ms, 1.10x",
    ]  # fmt: skip
    assert line("gpu-waterfall", "the norm")[2:] == ["refused", ""]


def test_a_marker_is_an_implementations_in_every_precision():
    pytest.importorskip("matplotlib")
    from report import plots

    names = [
        "engine bf16", "engine fp8", "engine fp32", "reference fp32 eager", "reference bf16 eager",
        "reference bf16 compile", "OpenVINO fp32", "OpenVINO bf16", "ONNX Runtime fp32",
        "transformers ViTModel bf16 (backbone only)",
    ]  # fmt: skip
    styles = plots._styles(names)
    assert list(styles) == names
    markers = [styles[name]["marker"] for name in names]
    assert len({*markers[:3]}) == len({*markers[3:5]}) == len({*markers[6:8]}) == 1
    assert len({*markers}) == 6
    assert len({tuple(map(str, style.values())) for style in styles.values()}) == len(names)
    assert styles["reference fp32 eager"]["color"] == styles["reference bf16 eager"]["color"]
    ours = {styles[name]["color"] for name in names[:3]}
    assert not ours & {styles[name]["color"] for name in names[3:]}
    lines = {name: styles[name]["linestyle"] for name in names}
    assert lines["engine bf16"] == lines["OpenVINO bf16"] != lines["OpenVINO fp32"]


def test_every_plot_is_drawn_with_its_labels_inside_and_its_figures_in_it(
    measured, stored, tmp_path
):
    pytest.importorskip("matplotlib")
    from report import plots

    assert run.main(["--plots", str(tmp_path / "plots")]) == 0
    (path,) = (tmp_path / "plots").iterdir()
    assert path.name == "cpu-throughput.png" and path.read_bytes().startswith(b"\x89PNG")
    measured()
    drawn = dict(plots.figures())
    names = ("cpu-throughput", "gpu-throughput", "gpu-roofline", "gpu-waterfall", "gpu-curves")
    assert set(drawn) == set(names)
    for name, figure in drawn.items():
        figure.canvas.draw()
        box, renderer = figure.bbox, figure.canvas.get_renderer()
        labels = [axis.title for axis in figure.axes]
        labels += [text for legend in figure.legends for text in legend.get_texts()]
        labels += [text for axis in figure.axes for text in axis.get_yticklabels()]
        for label in filter(lambda text: text.get_text(), labels):
            extent = label.get_window_extent(renderer)
            assert box.x0 <= extent.x0 and extent.x1 <= box.x1, (name, label.get_text())
    (axis,) = drawn["cpu-throughput"].axes
    bars = {c.get_label(): c.lines[2][0].get_segments() for c in axis.containers}
    low, high = bars["engine fp32"][0][:, 1]
    assert (low, high) == (pytest.approx(1 / 0.11), pytest.approx(1 / 0.09))
    assert len(bars["OpenVINO fp32"]) == 1  # the refused one has no point
    text = {t.get_text() for t in drawn["gpu-throughput"].legends[0].get_texts()}
    assert {"engine bf16", results.EAGER_FP32, "bf16 matrix ceiling", "fp8 matrix ceiling"} <= text
    (axis,) = drawn["gpu-roofline"].axes
    points = {
        (round(x, 3), round(y, 3))
        for found in axis.lines
        if len(found.get_xdata()) == 1
        for x, y in [(found.get_xdata()[0], found.get_ydata()[0])]
    }
    assert points == {(80.0, 400.0), (80.0, 160.0), (80.0, 200.0)}
