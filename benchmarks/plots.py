"""Pictures of CPU result files (extra viz). Error bars are quartiles.

Each function takes a result and returns a matplotlib figure that has its own canvas: pyplot keeps
state that is the user's.
"""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report import implementations

OURS, PLAIN, OTHERS = "#c1272d", "#333333", ("#0072b2", "#009e73", "#cc79a7", "#e69f00")
MARKERS = "osD^vP"


def _styles(names: list[str]) -> dict[str, dict[str, str]]:
    """Red is ours, black is plain PyTorch, dashed is bf16."""
    styles, others = {}, 0
    for index, name in enumerate(names):
        if name.startswith("engine"):
            color = OURS
        elif name.endswith("eager"):
            color = PLAIN
        else:
            color = OTHERS[others % len(OTHERS)]
            others += 1
        line = "--" if "bf16" in name else "-"
        styles[name] = {
            "color": color,
            "linestyle": line,
            "marker": MARKERS[index % len(MARKERS)],
        }
    return styles


def _rate(row: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Images a second, and how far its quartiles are below and above."""
    rate = row["images_per_second"]
    return rate, (rate - row["batch"] / row["high"], row["batch"] / row["low"] - rate)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with a canvas and no part in pyplot's state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def _where(result: dict[str, Any]) -> str:
    processor = result["processor"]
    return (
        f"{result['rows'][0]['model']}, {processor['name']}, {processor['threads']} threads, "
        f"{result['date']}, commit {result['commit']}"
    )


def throughput(result: dict[str, Any]) -> Figure:
    """Images a second against batch, a line an implementation."""
    figure = new_figure(10, 5.2)
    axis = figure.add_subplot()
    by_name = implementations(result["rows"])
    styles = _styles(list(by_name))
    batches = sorted({row["batch"] for row in result["rows"]})
    for index, (name, by_batch) in enumerate(by_name.items()):
        rows = [row for _, row in sorted(by_batch.items()) if "refused" not in row]
        if not rows:
            continue
        # Beside one another, so that error bars of equal rates do not hide each other.
        shift = 1.015 ** (index - len(by_name) / 2)
        rates, bars = zip(*map(_rate, rows), strict=True)
        axis.errorbar(
            [row["batch"] * shift for row in rows],
            rates,
            yerr=list(zip(*bars, strict=True)),
            label=name,
            capsize=3,
            markersize=5,
            linewidth=1.3,
            **styles[name],
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch, images")
    axis.set_ylabel("images per second (median and quartiles)")
    axis.grid(alpha=0.3)
    axis.set_title(f"Encoding on a CPU\n{_where(result)}", fontsize=10)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return figure


def by_batch(result: dict[str, Any]) -> Figure:
    """Speed-up over the baseline, a panel a batch and a line an implementation."""
    by_name = implementations(result["rows"])
    names = list(by_name)[::-1]
    styles = _styles(list(by_name))
    batches = sorted({row["batch"] for row in result["rows"]})
    figure = new_figure(3.2 + 2.8 * len(batches), 1.5 + 0.36 * len(names))
    axes = figure.subplots(1, len(batches), sharey=True, sharex=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for place, name in enumerate(names):
            row = by_name[name].get(batch)
            if row is None or "refused" in row:
                reason = "not run" if row is None else "refused"
                axis.text(0.97, place, reason, fontsize=8, va="center", ha="right", color="#777777")
                continue
            rate, bar = _rate(row)
            unit = row["speedup"] / rate
            axis.errorbar(
                row["speedup"],
                place,
                xerr=[[bar[0] * unit], [bar[1] * unit]],
                capsize=3,
                color=styles[name]["color"],
                marker="o",
            )
            axis.annotate(
                f"{row['speedup']:.2f}x",
                (row["speedup"], place),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axis.axvline(1, color=PLAIN, linewidth=0.8, linestyle=":")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(-0.6, len(names) - 0.3)
    figure.supxlabel(f"images per second, as a multiple of {result['baseline']}", fontsize=9)
    figure.suptitle(_where(result), fontsize=10)
    return figure
