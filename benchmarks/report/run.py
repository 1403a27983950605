"""The tables of the README and the plots, from the committed result files.

python -P benchmarks/report.py                 rewrites the tables of README.md
python -P benchmarks/report.py --check         exits 1 if README.md differs from the files
python -P benchmarks/report.py --plots FOLDER  draws the plots as PNG files

A table stands between markers named after it. A module of OTHERS adds to both: its `TABLES` maps
names to functions that return Markdown, its `PLOTS` names to functions that return a matplotlib
figure, or None where no result file has what it needs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OTHERS = ("report_ops", "report_gpu")


def newest(device: str, name: str) -> tuple[Path, dict]:
    """The latest result file of one benchmark on one device.

    Raises:
        FileNotFoundError: it was never measured.
    """
    found = [
        ((result["date"], result.get("time", "")), path, result)
        for path in sorted((RESULTS / device).glob(f"*-{name}.json"))
        for result in [json.loads(path.read_text())]
    ]
    if not found:
        raise FileNotFoundError(f"no result file {name!r} under {RESULTS / device}")
    _, path, result = max(found, key=lambda item: item[0])
    return path, result


def implementations(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Rows by name and batch, the fastest at the batch that most of them ran first."""
    by_name: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["batch"]] = row
    batches = [row["batch"] for row in rows]
    common = max(sorted(set(batches)), key=batches.count)

    def place(name: str) -> float:
        return by_name[name].get(common, {}).get("median", float("inf"))

    return {name: by_name[name] for name in sorted(by_name, key=place)}


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    low, high = row["batch"] / row["high"], row["batch"] / row["low"]
    return f"{row['images_per_second']:.2f} ({low:.2f} to {high:.2f}), {row['speedup']:.2f}x"


def _encode_lines(result: dict[str, Any]) -> Iterator[str]:
    rows = result["rows"]
    batches = sorted({row["batch"] for row in rows})
    yield "| images/s | " + " | ".join(f"batch {batch}" for batch in batches) + " | prepared in |"
    yield "|---|" + "---|" * (len(batches) + 1)
    for name, by_batch in implementations(rows).items():
        cells = [_cell(by_batch.get(batch)) for batch in batches]
        prepared = [row["prepare_seconds"] for row in by_batch.values() if "prepare_seconds" in row]
        cells.append(f"{max(prepared):.0f} s" if prepared else "")
        yield f"| {name} | " + " | ".join(cells) + " |"
    notes = [
        f"{row['name']} at batch {row['batch']} was refused a figure: {row['refused']}."
        for row in rows
        if "refused" in row
    ]
    notes += [f"{name} was skipped: {reason}." for name, reason in result["skipped"].items()]
    if notes:
        yield ""
        yield " ".join(notes)


def _memory_lines(result: dict[str, Any]) -> Iterator[str]:
    yield "| | latency at batch 1: median, 99th percentile | load | peak memory at batch 8 |"
    yield "|---|---|---|---|"
    latency = {row["name"].removesuffix(" eager"): row for row in result["latency"]}
    for row in result["footprint"]:
        calls = latency.get(row["name"])
        wait = ""
        if calls:
            wait = f"{calls['median'] * 1e3:.0f} ms, {calls['p99'] * 1e3:.0f} ms"
            wait += f" over {calls['calls']} calls"
        yield f"| {row['name']} | {wait} | {row['load_seconds']:.2f} s | {row['peak_mib']} MiB |"


def cpu_encode() -> str:
    """Engine, plain PyTorch and peers on a CPU."""
    path, result = newest("cpu", "encode")
    processor, versions = result["processor"], result["versions"]
    plan = result["plan"]
    rounds = ", ".join(f"{plan[batch]['rounds']}" for batch in plan)
    units = "with" if processor["bf16_matrix_units"] else "without"
    peers = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "transformers": "transformers"}
    names = "".join(f", {name} {versions[key]}" for key, name in peers.items() if key in versions)
    footer = (
        f"{result['rows'][0]['model']}, all five outputs; medians (quartiles) of {rounds} "
        f"alternated rounds at batch {', '.join(plan)}, against {result['baseline']} in the same "
        f"run; {processor['name']} (family {processor['family']}, model {processor['model']}), "
        f"{processor['threads']} threads, {units} bf16 matrix units, load average "
        f"{result['load_average_before'][0]:.2f} at the start; torch {versions['torch']}{names}; "
        f"{result['date']}, commit {result['commit']}, "
        f"`benchmarks/{path.relative_to(ROOT / 'benchmarks').as_posix()}`."
    )
    return "\n".join([*_encode_lines(result), "", *_memory_lines(result), "", footer])


def _cpu_plot(name: str) -> Callable[[], Any]:
    def draw() -> Any:
        import plots

        _, result = newest("cpu", "encode")
        return getattr(plots, name)(result)

    return draw


TABLES: dict[str, Callable[[], str]] = {"cpu-encode": cpu_encode}
PLOTS: dict[str, Callable[[], Any]] = {
    "cpu-throughput": _cpu_plot("throughput"),
    "cpu-by-batch": _cpu_plot("by_batch"),
}


def add_others(tables: dict, plots: dict, modules: tuple[str, ...]) -> None:
    """Adds what the modules that are there have."""
    for name in modules:
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            tables.update(module.TABLES)
            plots.update(module.PLOTS)


add_others(TABLES, PLOTS, OTHERS)


def fill(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        ValueError: a table's markers are not there.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n{table()}\n{end}"
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise ValueError(f"README.md needs the markers {begin} and {end} once, found {count}")
    return text


def draw(folder: Path) -> list[Path]:
    """Every plot that the result files support, as PNG files in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, plot in PLOTS.items():
        figure = plot()
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=150)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.plots is not None:
        print("\n".join(map(str, draw(options.plots))))
        return 0
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before)
    if options.check:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
