"""Pictures of a GPU result file (extra viz). Each function gives None where the file lacks it."""

from __future__ import annotations

from typing import Any

from cases import flops_per_image
from gpu_results import Measured, Row
from matplotlib.figure import Figure
from plots import MARKERS, OTHERS, OURS, PLAIN, new_figure
from report_gpu import waterfall_rows

from stellar_fast.config import MODELS

COLOURS = {"bf16": OURS, "fp8": OTHERS[0], "fp16": OTHERS[1], "fp32": OTHERS[3]}
RIVALS = {
    "eager_fp32": ("eager fp32", PLAIN, ":"),
    "eager_bf16": ("eager bf16", PLAIN, "--"),
    "vit_bf16": ("transformers ViTModel bf16 (backbone only)", OTHERS[2], "--"),
    "compile": ("torch.compile max-autotune bf16", "#7b3fa0", "--"),
}


def _where(measured: Measured) -> str:
    result = measured.result
    return f"{result['device']}, {result['date']}, commit {result['commit']}"


def roofline(measured: Measured) -> Figure | None:
    """Every kernel's rate against its FLOPs a byte, under this run's ceilings."""
    rows = [
        row
        for row in measured.rows("ops")
        if "floor" in row and not row["key"].endswith("/compile")
    ]
    known = measured.ceilings
    if not rows or "copy" not in known:
        return None
    figure = new_figure(10, 6)
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
            row["flops"] / row[row.get("ours", "kernel")]["median"] / 1e12,
            marker=(MARKERS + "Xd*p<>")[names.index(name)],
            linestyle="",
            markersize=8,
            color=COLOURS[row["precision"]],
            markerfacecolor=COLOURS[row["precision"]] if row["batch"] == batches[0] else "white",
        )
    for index, name in enumerate(names):
        axis.plot([], [], (MARKERS + "Xd*p<>")[index], color="#777777", linestyle="", label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.grid(alpha=0.3, which="both")
    open_ones = f", open: batch {batches[-1]}" if len(batches) > 1 else ""
    axis.set_title(
        f"Every kernel at {rows[0]['key'].split('/')[0]}, filled: batch {batches[0]}{open_ones}; "
        f"copy {known['copy'] / 1e12:.1f} TB/s\n{_where(measured)}",
        fontsize=10,
    )
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return figure


def _series(measured: Measured, model: str) -> dict[str, dict[int, Row]]:
    """Timings with their images/s by what ran, then by batch."""
    found: dict[str, dict[int, Row]] = {}
    for part in ("sweep", "encode", "compile"):
        for row in measured.rows(part):
            if row.get("model") != model:
                continue
            for name in ("engine", *RIVALS):
                if isinstance(row.get(name), dict):
                    label = f"engine {row['precision']}" if name == "engine" else name
                    found.setdefault(label, {})[row["batch"]] = row[name]
    return found


def throughput(measured: Measured) -> Figure | None:
    """Images a second against batch, a panel a model, with the ceilings."""
    by_model = {model: _series(measured, model) for model in MODELS}
    by_model = {model: series for model, series in by_model.items() if series}
    if not by_model:
        return None
    columns = min(3, len(by_model))
    lines = -(-len(by_model) // columns)
    figure = new_figure(3.8 * columns + 3.5, 3.4 * lines + 0.6)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    labels: dict[str, Any] = {}
    for axis, (model, series) in zip(axes, by_model.items(), strict=False):
        for label, by_batch in series.items():
            points = sorted(by_batch.items())
            if label.startswith("engine"):
                text, colour, line = label, COLOURS[label.split()[1]], "-"
            else:
                text, colour, line = RIVALS[label]
            rates = [batch / row["median"] for batch, row in points]
            below = [r - n / row["high"] for r, (n, row) in zip(rates, points, strict=True)]
            above = [n / row["low"] - r for r, (n, row) in zip(rates, points, strict=True)]
            labels[text] = axis.errorbar(
                [batch for batch, _ in points], rates, yerr=[below, above], color=colour,
                linestyle=line, marker="o", markersize=3.5, linewidth=1.2, capsize=2,
            )  # fmt: skip
        for precision in ("bf16", "fp8"):
            if precision in measured.ceilings and f"engine {precision}" in series:
                limit = measured.ceilings[precision] / flops_per_image(MODELS[model])
                text = f"{precision} matrix ceiling"
                labels[text] = axis.axhline(
                    limit, color=COLOURS[precision], linewidth=0.9, linestyle=(0, (1, 3))
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks((1, 8, 64, 512), ("1", "8", "64", "512"))
        axis.set_xlabel("batch, images", fontsize=9)
        axis.set_title(model, fontsize=10)
        axis.grid(alpha=0.3, which="both")
    for axis in axes[len(by_model) :]:
        axis.set_axis_off()
    figure.supylabel("images per second (median and quartiles)", fontsize=9)
    figure.suptitle(_where(measured), fontsize=10)
    handles, names = list(labels.values()), list(labels)
    figure.legend(handles, names, loc="outside right center", fontsize=9, frameon=False)
    return figure


def waterfall(measured: Measured) -> Figure | None:
    """How much slower the engine is without each optimisation, a panel a precision and batch."""
    by_switch = {
        switch: {point: row for point, row in rows.items() if "ratio" in row}
        for switch, rows in waterfall_rows(measured).items()
    }
    by_switch = {switch: rows for switch, rows in by_switch.items() if rows}
    if not by_switch:
        return None
    points = list(dict.fromkeys(point for rows in by_switch.values() for point in rows))
    names = list(by_switch)[::-1]
    figure = new_figure(2.4 + 2.9 * len(points), 1.6 + 0.4 * len(names))
    axes = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for axis, (precision, batch) in zip(axes, points, strict=True):
        for place, name in enumerate(names):
            row = by_switch[name].get((precision, batch))
            if row is None:
                continue
            full, without = row["full"], row["without"]
            spread = [
                [row["ratio"] - without["low"] / full["median"]],
                [without["high"] / full["median"] - row["ratio"]],
            ]
            axis.barh(place, row["ratio"] - 1, left=1, color=COLOURS[precision], height=0.6)
            axis.errorbar(row["ratio"], place, xerr=spread, color=PLAIN, capsize=2, linewidth=1)
            edge = max(1.0, without["high"] / full["median"])
            axis.annotate(
                f" {row['ratio']:.2f}x", (edge, place), fontsize=8, va="center", ha="left"
            )
        axis.axvline(1, color=PLAIN, linewidth=0.8)
        axis.margins(x=0.25)
        axis.set_title(f"{precision}, batch {batch}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [f"without {name}" for name in names], fontsize=9)
    figure.supxlabel("time as a multiple of the whole engine's (median, quartiles)", fontsize=9)
    model = next(iter(next(iter(by_switch.values())).values()))["model"]
    figure.suptitle(f"{model}, one at a time; {_where(measured)}", fontsize=10)
    return figure


def curves(measured: Measured) -> Figure | None:
    """Milliseconds an image against the image's side, and against the number of sparse tokens."""
    rows = [row for row in measured.rows("curves") if "engine" in row]
    by_side: dict[tuple[str, str], dict[int, Row]] = {}
    by_tokens: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["model"] in ("stellar-b16", "stellar-h16"):
            by_side.setdefault((row["model"], row["precision"]), {})[row["side"]] = row
        if row["side"] == 224 and row["model"].startswith("stellar-b"):
            by_tokens.setdefault(row["precision"], {})[row["tokens"]] = row
    if not rows:
        return None
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)

    def line(axis: Any, by_place: dict[int, Row], label: str, colour: str, style: str) -> None:
        places = sorted(by_place)
        found = [1e3 * by_place[p]["engine"]["median"] / by_place[p]["batch"] for p in places]
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
    figure.suptitle(_where(measured), fontsize=10)
    return figure
