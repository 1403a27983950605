"""What every table needs: Markdown, rows and columns out of rows, and a run's own words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness.floors import rates
from harness.results import ROOT, Result, Row, found, is_ours, problem, with_older


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; no text may break out of its cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def pivot(
    rows: Iterable[Row], index: Callable[[Row], Any], column: Callable[[Row], Any]
) -> dict[Any, dict[Any, Row]]:
    """Rows by `index`, then by `column`, both in the order in which they first come."""
    table: dict[Any, dict[Any, Row]] = {}
    for row in rows:
        table.setdefault(index(row), {})[column(row)] = row
    return table


def by_speed(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Rows by name and batch, the fastest at the batch that most of them ran first."""
    table = pivot(rows, lambda row: row["name"], lambda row: row["batch"])
    batches = [row["batch"] for row in rows]
    common = max(sorted(set(batches)), key=batches.count)
    return dict(
        sorted(table.items(), key=lambda item: item[1].get(common, {}).get("median", float("inf")))
    )


def own(result: Result, stage: str, key: str) -> Row | None:
    """Our row of a job, or the one that says why there is none."""
    rows = result.jobs.get((stage, key), [])
    return next((row for row in rows if is_ours(row) or problem(row)), None)


def named(result: Result, stage: str, key: str, name: str) -> Row | None:
    """The row of an implementation in a job."""
    return next((r for r in result.jobs.get((stage, key), []) if r["name"] == name), None)


def newest(name: str) -> Result | None:
    """The newest result file of a benchmark, whatever the machine."""
    return next(iter(found(name)), None)


def newest_on_gpu() -> Result | None:
    """The newest result file of a GPU, and what older ones of that GPU have beside it."""
    return with_older(found("gpu"))


def place(result: Result) -> str:
    return f"`{result.path.relative_to(ROOT).as_posix()}`"


def on_cpu(result: Result) -> str:
    """Machine, versions, date, commit and file of a CPU's result, for below a table."""
    processor, versions = result.facts["processor"], result.facts["versions"]
    units = "bf16 matrix units (AMX)"
    if not processor["bf16_matrix_units"]:
        units = f"{'AVX512-BF16, ' * processor.get('avx512_bf16', False)}no matrix units"
    peers = {
        "openvino": "OpenVINO",
        "nncf": "NNCF",
        "onnxruntime": "ONNX Runtime",
        "transformers": "transformers",
    }
    names = "".join(f", {name} {versions[key]}" for key, name in peers.items() if key in versions)
    return (
        f"{processor['name']} (family {processor['family']}, model {processor['model']}), "
        f"{processor['threads']} threads, {units}; torch {versions['torch']}"
        f"{names}; {result.facts['date']}, commit {result.facts['commit']}, {place(result)}."
    )


def on_gpu(result: Result) -> str:
    """Device, dates, commit, versions, command, tests, ceilings and file, for below a table."""
    facts = result.facts
    dates = sorted({run["date"] for run in result.runs})
    known = [
        f"{name} {rate / 1e9:.0f} GB/s" if name == "copy" else f"{name} {rate / 1e12:.0f}"
        for name, rate in rates(result.rows("ceilings")).items()
    ]
    green = "not run"
    for stage in ("tests", "smoke"):
        rows = [row for row in result.rows(stage) if "of_commit" not in row]
        if rows:
            (tests,) = rows
            said = tests.get("summary", tests.get("failed", ""))
            green = "RED: " * ("failed" in tests) + str(said)
            green += ", the short ones" * (stage == "smoke")
            break
    names = [name for name in ("torch", "triton") if name in facts["versions"]]
    packages = ", ".join(f"{name} {facts['versions'][name]}" for name in names)
    return (
        f"{facts['device']}, {' and '.join(dates)}, commit {facts['commit']}, {packages}; "
        f"`{facts['command']}`; GPU tests at that commit: {green}; ceilings of the same run, "
        f"in TFLOP/s: {', '.join(known) or 'not measured'}; {place(result)}."
    )
