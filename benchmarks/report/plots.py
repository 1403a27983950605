"""Pictures of the newest result files (extra viz). Error bars are quartiles.

Figures have their own canvas: pyplot keeps state that is the user's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.floors import rates
from harness.results import Result, Row, is_ours  # fmt: skip
from harness.workloads import flops_per_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from report.gpu import switched_off
from report.tables import newest

from stellar_fast.config import MODELS

OURS, PLAIN, OTHERS = "#c1272d", "#333333", ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#7b3fa0")
WITHOUT = "engine without"
MARKERS = "osD^vPXd*p<>hH8"
LINES: dict[str, Any] = {
    "fp32": "-", "bf16": "--", "fp16": ":", "fp8": "-.", "int8": (0, (1, 1))
}  # fmt: skip
COLOURS = {"bf16": OURS, "fp8": OTHERS[0], "fp16": OTHERS[1], "fp32": OTHERS[3]}


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with a canvas and no part in pyplot's state."""
    spaced = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=spaced)
    FigureCanvasAgg(figure)
    return figure


def _where(result: Result) -> str:
    facts = result.facts
    device = facts.get("device") or "{name}, {threads} threads".format(**facts["processor"])
    return f"{device}, {facts['date']}, commit {facts['commit']}"


def _implementation(name: str) -> str:
    """A name without its precision."""
    return " ".join(word for word in name.split() if word not in LINES)


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """By name: a marker is an implementation's, in whatever precision, a line a precision's. Red is
    ours, or a precision's colour where there is FP8, and black is plain PyTorch."""
    implementations = list(dict.fromkeys(map(_implementation, names)))
    markers = dict(zip(implementations, MARKERS, strict=False))
    by_precision = any("fp8" in name for name in names)
    free = [colour for colour in OTHERS if not by_precision or colour not in COLOURS.values()]
    others = (name for name in implementations if not name.startswith("engine"))
    others = (name for name in others if not name.endswith("eager"))
    colours = dict(zip(others, free * len(names), strict=False))
    styles = {}
    for name in names:
        precision = next((word for word in name.split() if word in LINES), "fp32")
        implementation = _implementation(name)
        if name.startswith("engine"):
            colour = COLOURS[precision] if by_precision else OURS
        else:
            colour = colours.get(implementation, PLAIN)
        styles[name] = {
            "color": colour, "linestyle": LINES[precision], "marker": markers[implementation]
        }  # fmt: skip
    return styles


def throughput(result: Result) -> Figure | None:
    """Images a second against batch, a panel a model, with the ceilings of a GPU."""
    rows = [
        row
        for stage in ("sweep", "encode", "compile", "compilers")
        for row in result.rows(stage)
        if "images_per_second" in row
    ]
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    if not models:
        return None
    styles = _styles(list(dict.fromkeys(row["name"] for row in rows)))
    known = rates(result.rows("ceilings"))
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    figure = _figure(max(10.0, 3.8 * columns + 3.5), max(5.2, 3.4 * lines + 0.6))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    labels: dict[str, Any] = {}
    for axis, model in zip(axes, models, strict=False):
        for index, (name, style) in enumerate(styles.items()):
            points = {
                row["batch"]: row for row in rows if (row["model"], row["name"]) == (model, name)
            }
            if not points:
                continue
            found = [points[batch] for batch in sorted(points)]
            middle = [row["images_per_second"] for row in found]
            below = [r - f["batch"] / f["high"] for r, f in zip(middle, found, strict=True)]
            above = [f["batch"] / f["low"] - r for r, f in zip(middle, found, strict=True)]
            # Beside one another, so that error bars of equal rates do not hide each other.
            shift = 1.015 ** (index - len(styles) / 2)
            labels[name] = axis.errorbar(
                [row["batch"] * shift for row in found], middle, yerr=[below, above], label=name,
                capsize=3, markersize=4, linewidth=1.2, **style,
            )  # fmt: skip
        for precision in ("bf16", "fp8"):
            if precision in known and f"engine {precision}" in styles:
                limit = known[precision] / flops_per_image(MODELS[model])
                labels[f"{precision} matrix ceiling"] = axis.axhline(
                    limit, color=COLOURS[precision], linewidth=0.9, linestyle=(0, (1, 3))
                )
        batches = sorted({row["batch"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        if known:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("batch, images", fontsize=9)
        axis.set_title(model, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(models) :]:
        axis.set_axis_off()
    figure.supylabel("images per second (median and quartiles)", fontsize=9)
    figure.suptitle(_where(result), fontsize=10)
    handles, names = list(labels.values()), list(labels)
    figure.legend(handles, names, loc="outside right center", fontsize=9, frameon=False)
    return figure


def roofline(result: Result) -> Figure | None:
    """Every kernel's rate against its FLOPs a byte, under this run's ceilings."""
    rows = [
        row for row in result.rows("ops") if "floor" in row and not row["key"].endswith("/compile")
    ]
    known = rates(result.rows("ceilings"))
    if not rows or "copy" not in known:
        return None
    figure = _figure(10, 6)
    axis = figure.add_subplot()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensity) / 2, max(max(intensity) * 2, 1000.0)
    for precision in dict.fromkeys(row["precision"] for row in rows):
        rate = known[precision]
        ridge = rate / known["copy"]
        axis.plot(
            [low, ridge, high],
            [low * known["copy"] / 1e12, rate / 1e12, rate / 1e12],
            color=COLOURS[precision],
            linewidth=1.2,
            label=f"{precision} ceiling, {rate / 1e12:.0f} TFLOP/s",
        )
    batches = sorted({row["batch"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["key"].split("/")[-1] for row in rows))
    for row, at in zip(rows, intensity, strict=True):
        name = row["key"].split("/")[-1]
        axis.plot(
            at,
            row["flops"] / row["median"] / 1e12,
            marker=MARKERS[names.index(name)],
            linestyle="",
            markersize=8,
            color=COLOURS[row["precision"]],
            markerfacecolor=COLOURS[row["precision"]] if row["batch"] == batches[0] else "white",
        )
    for index, name in enumerate(names):
        axis.plot([], [], MARKERS[index], color="#777777", linestyle="", label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.grid(alpha=0.3, which="both")
    open_ones = f", open: batch {batches[-1]}" if len(batches) > 1 else ""
    axis.set_title(
        f"Every kernel at {rows[0]['key'].split('/')[0]}, filled: batch {batches[0]}{open_ones}; "
        f"copy {known['copy'] / 1e12:.1f} TB/s\n{_where(result)}",
        fontsize=10,
    )
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return figure


def waterfall(result: Result) -> Figure | None:
    """How much slower the engine is without each optimisation, a panel a precision and batch."""
    by_switch = {
        switch: {point: job for point, job in jobs.items() if "ratio" in job.get(WITHOUT, {})}
        for switch, jobs in switched_off(result).items()
    }
    by_switch = {switch: jobs for switch, jobs in by_switch.items() if jobs}
    if not by_switch:
        return None
    points = list(dict.fromkeys(point for jobs in by_switch.values() for point in jobs))
    names = list(by_switch)[::-1]
    figure = _figure(2.4 + 2.9 * len(points), 1.6 + 0.4 * len(names))
    axes = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for axis, (precision, batch) in zip(axes, points, strict=True):
        for place, name in enumerate(names):
            job = by_switch[name].get((precision, batch))
            if job is None:
                continue
            full, without = job["engine"], job[WITHOUT]
            ratio = without["ratio"]
            spread = [
                [ratio - without["low"] / full["median"]],
                [without["high"] / full["median"] - ratio],
            ]
            axis.barh(place, ratio - 1, left=1, color=COLOURS[precision], height=0.6)
            axis.errorbar(ratio, place, xerr=spread, color=PLAIN, capsize=2, linewidth=1)
            edge = max(1.0, without["high"] / full["median"])
            axis.annotate(f" {ratio:.2f}x", (edge, place), fontsize=8, va="center", ha="left")
        axis.axvline(1, color=PLAIN, linewidth=0.8)
        axis.margins(x=0.25)
        axis.set_title(f"{precision}, batch {batch}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [f"without {name}" for name in names], fontsize=9)
    figure.supxlabel("time as a multiple of the whole engine's (median, quartiles)", fontsize=9)
    figure.suptitle(f"{full['model']}, one at a time; {_where(result)}", fontsize=10)
    return figure


def curves(result: Result) -> Figure | None:
    """Milliseconds an image against the image's side, and against the number of sparse tokens."""
    rows = [row for row in result.rows("curves") if is_ours(row) and "median" in row]
    by_side: dict[tuple[str, str], dict[int, Row]] = {}
    by_tokens: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["model"] in ("stellar-b16", "stellar-h16"):
            by_side.setdefault((row["model"], row["precision"]), {})[row["side"]] = row
        if row["side"] == 224 and row["model"].startswith("stellar-b"):
            by_tokens.setdefault(row["precision"], {})[row["tokens"]] = row
    if not rows:
        return None
    figure = _figure(10, 4.2)
    left, right = figure.subplots(1, 2)

    def line(axis: Any, by_place: dict[int, Row], label: str, colour: str, style: str) -> None:
        places = sorted(by_place)
        found = [1e3 * by_place[p]["median"] / by_place[p]["batch"] for p in places]
        axis.plot(places, found, marker="o", color=colour, linestyle=style, label=label)
        axis.set_xticks(places)

    for (model, precision), by_place in by_side.items():
        style = "-" if model == "stellar-h16" else "--"
        batch = next(iter(by_place.values()))["batch"]
        label = f"{model} {precision}, batch {batch}"
        line(left, by_place, label, COLOURS[precision], style)
    left.set_yscale("log")
    left.set_xlabel("side of the image, pixels")
    for precision, by_place in by_tokens.items():
        line(right, by_place, f"B/16 {precision}, batch 64", COLOURS[precision], "-")
    right.set_ylim(bottom=0)
    right.set_xlabel("sparse tokens K")
    for axis in (left, right):
        axis.set_ylabel("ms an image")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(_where(result), fontsize=10)
    return figure


def figures() -> Iterator[tuple[str, Figure]]:
    """Names and pictures of all that the newest result files have."""
    for name, device, plots in (
        ("encode", "cpu", (throughput,)),
        ("gpu", "gpu", (throughput, roofline, waterfall, curves)),
    ):
        result = newest(name)
        if result is None:
            continue
        for plot in plots:
            figure = plot(result)
            if figure is not None:
                yield f"{device}-{plot.__name__}", figure
