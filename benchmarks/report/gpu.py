"""Tables of what was measured on a GPU, and of what was predicted; see `report.py`.

A table takes the newest result file of `gpu.py`. What a file lacks is "not measured"; where there
is no file at all, the table is one sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_goals
from gpu_results import Measured, Row, newest, newest_cpu, newest_predictions

NOTHING = "Nothing has been measured on a GPU yet"


def goals() -> str:
    """The design's goals, each with what was measured."""
    measured = newest()
    if measured is None:
        return f"{NOTHING}, so no goal for one can be met or missed yet."
    lines = ["| goal | | measured | of the goal | met |", "|---|---|---|---|---|"]
    lines += gpu_goals.lines(measured, newest_cpu())
    return "\n".join([*lines, "", measured.where])


ENCODE_HEAD = (
    "images/s", "of the matrix ceiling", "times eager fp32, eager bf16", "times torch.compile bf16",
    "one image: median, 99th percentile", "peak memory", "load, first call", "energy an image",
)  # fmt: skip


def _encode_cells(row: Row, compiled: Row | None) -> Iterator[str]:
    """The cells of `ENCODE_HEAD`; empty where the row has no such figure."""
    ours = row["engine"]
    batch, median = row["batch"], ours["median"]
    low, high = batch / ours["high"], batch / ours["low"]
    yield f"{ours['images_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"
    yield f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else ""
    eager = [
        f"{row[name]['median'] / median:.2f}x" if name in row else "not run"
        for name in ("eager_fp32", "eager_bf16")
        if name in row or name in row.get("not_run", {})
    ]
    yield ", ".join(eager)
    own = (compiled or {}).get(f"engine_{row['precision']}")
    if own and "compile" in compiled:
        yield f"{compiled['compile']['median'] / own['median']:.2f}x"
    else:
        yield "not run" if compiled and "compile" in compiled.get("not_run", {}) else ""
    tail = [f"{1e3 * row[k]:.2f} ms" for k in ("latency_median", "latency_p99") if k in row]
    yield ", ".join(tail)
    yield f"{row['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in row else ""
    seconds = [f"{row[k]:.1f} s" for k in ("load_seconds", "first_call_seconds") if k in row]
    yield ", ".join(seconds)
    joules = row.get("joules_per_image")
    yield f"{1e3 * joules:.1f} mJ" if joules else ("not reported" if "energy" in row else "")


def encode() -> str:
    """The engine end to end at the goals' points."""
    measured = newest()
    if measured is None:
        return f"{NOTHING}: how many images a second the engine encodes is not known."
    rows = measured.rows("encode")
    if not rows:
        return f"No engine was timed in this run. {measured.where}"
    lines = [f"| | {' | '.join(ENCODE_HEAD)} |", "|---" * (1 + len(ENCODE_HEAD)) + "|"]
    notes = []
    for row in rows:
        model, batch, precision = row["key"].split("/")
        name = f"{model} {precision}, batch {batch[1:]}"
        compiled = measured.row("compile", f"{model}/{batch}/compile")
        if "engine" in row:
            lines.append(f"| {name} | {' | '.join(_encode_cells(row, compiled))} |")
        else:
            why = "refused" if "refused" in row else "failed"
            lines.append(f"| {name} | {why}{' |' * len(ENCODE_HEAD)}")
            notes.append(f"{name} {why}: {row.get(why, '').splitlines()[0]}.")
        notes += [
            f"{name}: {peer} did not run ({w})." for peer, w in row.get("not_run", {}).items()
        ]
        if "vit_bf16" in row:
            ratio = row["vit_bf16"]["median"] / row["engine"]["median"]
            notes.append(f"{name}: {ratio:.2f}x transformers ViTModel bf16, the backbone alone.")
    for row in measured.rows("compile"):
        model, batch, _ = row["key"].split("/")
        if "compile_seconds" in row:
            seconds = f"{row['compile_seconds']:.0f} s"
            notes.append(f"torch.compile of {model} at batch {batch[1:]} took {seconds}.")
        notes += [f"{row['key']}: {why}." for why in row.get("not_run", {}).values()]
    return "\n".join([*lines, "", " ".join([*notes, measured.where])])


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


def _timed(row: Row, ours: str) -> dict[str, float]:
    """Medians of everything but ours."""
    return {
        name: value["median"]
        for name, value in row.items()
        if isinstance(value, dict) and "median" in value and name != ours
    }


def _predicted_op(op: str, rows: Sequence[Row]) -> float | None:
    """Predicted seconds of one op of a forward; the spatial map is three launches."""
    if op == "spatial_map":
        wanted = [row for row in rows if row["op"] in ("sparse_proj", "similarity", "spatial")]
        last = {row["op"]: row["seconds"] for row in wanted}  # the first sparse_proj is a query's
        return sum(last.values()) if len(last) == 3 else None
    return next((row["seconds"] for row in rows if row["op"] == op), None)


def _predictions() -> dict[tuple[str, str, int], Row]:
    found = newest_predictions()
    results = found["results"] if found else []
    return {(r["model"], r["precision"], r["batch"]): r for r in results if r["arch"] == 90}


def _kernel_line(row: Row, compiled: Row | None, predicted: float | None) -> str:
    model, batch, precision, op = row["key"].split("/")
    name = f"| {model} {op}, batch {batch[1:]}, {precision} | "
    for problem in ("refused", "failed"):
        if problem in row:
            reason = row[problem].splitlines()[0].replace("|", "/")
            return f"{name}{problem}: {reason} | | | | |"
    ours = row.get("ours", "kernel")
    median = row[ours]["median"]
    ratios = {rival: seconds / median for rival, seconds in _timed(row, ours).items()}
    if compiled and ours in compiled:
        own = compiled[ours]["median"]
        ratios |= {rival: seconds / own for rival, seconds in _timed(compiled, ours).items()}
    against = [f"{rival} {ratio:.2f}x" for rival, ratio in ratios.items()]
    against += [f"{rival} did not run" for rival in row.get("not_run", {})]
    floor = share = ""
    if "floor" in row:
        floor, share = f"{_microseconds(row['floor'])} ({row['bound']})", f"{row['of_floor']:.0%}"
    guess = "" if predicted is None else f"{_microseconds(predicted)} ({predicted / median:.2f}x)"
    return f"{name}{_microseconds(median)} | {floor} | {share} | {guess} | {'; '.join(against)} |"


def kernels() -> str:
    """Each kernel beside its floor, its prediction and its rivals."""
    measured = newest()
    if measured is None:
        return f"{NOTHING}: no kernel has a time."
    rows = measured.rows("ops")
    if not rows:
        return f"No kernel was timed in this run. {measured.where}"
    compiled = {row["key"]: row for row in rows if row["key"].endswith("/compile")}
    predictions = _predictions() if "H200" in measured.result["device"] else {}
    lines = [
        "| kernel | time | floor (bound by) | floor / time | PREDICTED time (of the measured) | "
        "speed-up over |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["key"] in compiled:
            continue
        model, batch, precision, op = row["key"].split("/")
        guess = predictions.get((model, precision, int(batch[1:])))
        seconds = _predicted_op(op, guess["rows"]) if guess else None
        lines.append(_kernel_line(row, compiled.get(f"{row['key']}/compile"), seconds))
    modes = sorted({row["compile_mode"] for row in compiled.values() if "compile_mode" in row})
    note = f"torch.compile in mode {', '.join(modes)}. " if modes else ""
    return "\n".join([*lines, "", note + measured.where])


def waterfall_rows(measured: Measured) -> dict[str, dict[tuple[str, int], Row]]:
    """Rows by switch, then by precision and batch; what brings most at any point first."""
    found: dict[str, dict[tuple[str, int], Row]] = {}
    for row in measured.rows("waterfall"):
        if "switch" in row:
            found.setdefault(row["switch"], {})[row["precision"], row["batch"]] = row

    def gain(switch: str) -> float:
        return max((row.get("ratio", 0.0) for row in found[switch].values()), default=0.0)

    return {switch: found[switch] for switch in sorted(found, key=gain, reverse=True)}


def waterfall() -> str:
    """What each optimisation brings."""
    measured = newest()
    if measured is None:
        return f"{NOTHING}: what each optimisation brings is not known."
    by_switch = waterfall_rows(measured)
    if not by_switch:
        return f"No optimisation was switched off in this run. {measured.where}"
    points = list(dict.fromkeys(point for rows in by_switch.values() for point in rows))
    heads = [f"{precision}, batch {batch}" for precision, batch in points]
    lines = [
        f"| switched off | instead | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(heads),
    ]
    for rows in by_switch.values():
        some = next(iter(rows.values()))
        cells = []
        for row in (rows.get(point) for point in points):
            if row is None:
                cells.append("")
            elif "refused" in row:
                cells.append("refused")
            else:
                full, without = (1e3 * row[name]["median"] for name in ("full", "without"))
                cells.append(f"{full:.2f} to {without:.2f} ms, {row['ratio']:.2f}x")
        lines.append(f"| {some['what']} | {some['instead']} | {' | '.join(cells)} |")
    model = next(iter(next(iter(by_switch.values())).values()))["model"]
    return "\n".join([*lines, "", f"{model}, one at a time. {measured.where}"])


def predicted() -> str:
    """What the machine code makes of the models on an H200."""
    found = newest_predictions()
    if found is None:
        return "Nothing has been predicted."
    measured = newest()
    if measured is not None and "H200" not in measured.result["device"]:
        measured = None
    lines = [
        "| PREDICTED, not measured | time | images/s | floor | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for (model, precision, batch), guess in _predictions().items():
        row = measured.encode(model, batch, precision) if measured else None
        real = row["engine"]["median"] if row and "engine" in row else None
        rate = float(f"{guess['images_per_second']:.3g}")
        cells = ["not measured", ""]
        if real:
            cells = [f"{1e3 * real:.3g} ms", f"{guess['seconds'] / real - 1:+.0%}"]
        lines.append(
            f"| {model} {precision}, batch {batch} | {1e3 * guess['seconds']:.3g} ms | "
            f"{rate:,.0f} | {1e3 * guess['floor']:.3g} ms | "
            f"{' | '.join(cells)} |"
        )
    chip = found["chips"]["90"]
    note = (
        f"Predicted for an {chip['name']} from the kernels' machine code by "
        f"`benchmarks/predict.py`, which says what it assumes: {chip['matrix'] / 1e12:.0f} TFLOP/s "
        f"bf16, {chip['copy'] / 1e12:.1f} TB/s ({chip['source']}); kernels of {found['date']}, "
        f"commit {found['commit']}, triton {found['versions']['triton']}."
    )
    return "\n".join([*lines, "", note])


def _plot(name: str) -> Callable[[], Any]:
    def draw() -> Any:
        measured = newest()
        if measured is None:
            return None
        import plots_gpu

        return getattr(plots_gpu, name)(measured)

    return draw


TABLES: dict[str, Callable[[], str]] = {
    "gpu-goals": goals,
    "gpu-encode": encode,
    "gpu-kernels": kernels,
    "gpu-waterfall": waterfall,
    "predicted": predicted,
}
PLOTS: dict[str, Callable[[], Any]] = {
    f"gpu-{name}": _plot(name) for name in ("roofline", "throughput", "waterfall", "curves")
}
