"""Tables of what was measured on a GPU, and of what was predicted; see `report.py`.

A table takes the newest result file of `gpu.py`. What a file lacks is "not measured"; where there
is no file at all, the table is one sentence that says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_goals
from ceilings import rates, with_floor

RESULTS = Path(__file__).parent / "results"
NOTHING = "Nothing has been measured on a GPU yet"
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A result file of `gpu.py`: its rows by part and key, and its ceilings."""

    path: Path
    result: Row

    @property
    def ceilings(self) -> dict[str, float]:
        """FLOP/s by precision, and bytes/s of "copy"."""
        return rates(self.result["rows"])

    def rows(self, part: str) -> list[Row]:
        """The rows of a part that are no bookkeeping, with their floors."""
        return [
            with_floor(row, self.ceilings)
            for row in self.result["rows"]
            if row["part"] == part and row["key"] not in ("part", "finished")
        ]

    def row(self, part: str, key: str) -> Row | None:
        return next((row for row in self.rows(part) if row["key"] == key), None)

    def encode(self, model: str, batch: int, precision: str) -> Row | None:
        """The row of `encode`, else of the sweep."""
        key = f"{model}/b{batch}/{precision}"
        return self.row("encode", key) or self.row("sweep", key)

    @property
    def tests(self) -> Row | None:
        return self.row("tests", "tests")

    @property
    def where(self) -> str:
        """Device, dates, commit, versions, command, tests, ceilings and file, for below a table."""
        result, versions = self.result, self.result["versions"]
        dates = sorted({run["date"] for run in result.get("runs", [])} or {result["date"]})
        rates = [
            f"{name} {rate / 1e9:.0f} GB/s" if name == "copy" else f"{name} {rate / 1e12:.0f}"
            for name, rate in self.ceilings.items()
        ]
        tests = self.tests
        green = "not run" if tests is None else ("RED: " * ("failed" in tests)) + tests["summary"]
        packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton"))
        place = self.path.relative_to(RESULTS.parent.parent).as_posix()
        return (
            f"{result['device']}, {' and '.join(dates)}, commit {result['commit']}, {packages}; "
            f"`{result['command']}`; GPU tests at that commit: {green}; ceilings of the same run, "
            f"in TFLOP/s: {', '.join(rates) or 'not measured'}; `{place}`."
        )


def _files(folder: Path, name: str) -> Iterator[tuple[Path, Row]]:
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("name") == name:
            yield path, result


def newest() -> Measured | None:
    """The latest result file of `gpu.py`, whatever the device."""
    found = [
        ((last["date"], last["time"]), path, result)
        for folder in sorted(RESULTS.glob("*/"))
        for path, result in _files(folder, "gpu")
        for last in [(result.get("runs") or [result])[-1]]
    ]
    if not found:
        return None
    _, path, result = max(found, key=lambda item: item[:2])
    return Measured(path, result)


def newest_predictions() -> Row | None:
    """The latest file of `predict.py --json` that was kept."""
    found = list(_files(RESULTS / "predicted", "predicted"))
    return max(found, key=lambda item: (item[1]["date"], item[1]["time"]))[1] if found else None


def goals() -> str:
    """The design's goals, each with what was measured."""
    measured = newest()
    if measured is None:
        return f"{NOTHING}, so no goal for one can be met or missed yet."
    cpu = [result for _, result in _files(RESULTS / "cpu", "encode")]
    newest_cpu = max(cpu, key=lambda r: (r["date"], r.get("time", "")), default=None)
    lines = ["| goal | | measured | of the goal | met |", "|---|---|---|---|---|"]
    lines += gpu_goals.lines(measured, newest_cpu)
    return "\n".join([*lines, "", measured.where])


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
    "gpu-kernels": kernels,
    "gpu-waterfall": waterfall,
    "predicted": predicted,
}
PLOTS: dict[str, Callable[[], Any]] = {
    f"gpu-{name}": _plot(name) for name in ("roofline", "throughput", "waterfall", "curves")
}
