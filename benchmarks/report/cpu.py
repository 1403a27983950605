"""Tables of what was measured on CPUs: for each kind of processor its newest result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.floors import rates
from harness.results import (
    BASELINES,
    Result,
    Row,
    is_ours,
    newest_of_each_kind,
    problem,
)  # fmt: skip
from report.tables import by_speed, markdown, on_cpu, pivot

OPS = ("patch_embed", "qkv", "attention", "proj", "fc1", "fc2", "norm", "spatial_map", "reassemble")
RIVALS = ("eager", "torch.compile", "product alone, PyTorch")
Table = Callable[[Result], Iterator[str]]


def of_each_kind(name: str, table: Table) -> str:
    """The table of every kind of processor, one below the other."""
    blocks = ["\n\n".join(table(result)) for result in newest_of_each_kind(name)]
    return "\n\n".join(blocks) or "Nothing has been measured on a CPU."


def _cell(row: Row | None) -> str:
    if row is None or "refused" in row or "not_run" in row:
        return "" if row is None else "refused" if "refused" in row else "not run"
    low, high = row["batch"] / row["high"], row["batch"] / row["low"]
    return f"{row['images_per_second']:.2f} ({low:.2f} to {high:.2f}), {row['speedup']:.2f}x"


def _prepared(rows: dict[int, Row]) -> str:
    found = [row["prepare_seconds"] for row in rows.values() if "prepare_seconds" in row]
    return f"{max(found):.0f} s" if found else ""


def _error(rows: dict[int, Row]) -> str:
    """The largest relative error of any output at any batch."""
    found = [error for row in rows.values() for error in row.get("error", {}).values()]
    return f"{max(found):.1e}" if found else ""


def encode(result: Result) -> Iterator[str]:
    """Engine, plain PyTorch and peers."""
    rows = result.rows("encode")
    batches = sorted({row["batch"] for row in rows})
    yield markdown(
        ["images/s", *(f"batch {batch}" for batch in batches), "error", "prepared in"],
        (
            [name, *(_cell(found.get(batch)) for batch in batches), _error(found), _prepared(found)]
            for name, found in by_speed(rows).items()
        ),
    )
    notes = [f"{r['name']} at batch {r['batch']}: {problem(r)}." for r in rows if problem(r)]
    if notes:
        yield " ".join(notes)
    latency = {row["name"].removesuffix(" eager"): row for row in result.rows("latency")}
    waits = {
        name: f"{1e3 * r['median']:.0f} ms, {1e3 * r['p99']:.0f} ms over {r['calls']} calls"
        for name, r in latency.items()
    }
    yield markdown(
        ["", "latency at batch 1: median, 99th percentile", "load",
         "first result, from the start of the process", "peak memory at batch 8"],
        (
            [r["name"], waits.get(r["name"], ""), f"{r['load_seconds']:.2f} s",
             f"{r['first_result_seconds']:.2f} s" if "first_result_seconds" in r else "",
             f"{r['peak_mib']} MiB"]
            for r in result.rows("footprint")
        ),
    )  # fmt: skip
    plan = result.facts["plan"]
    rounds = ", ".join(str(each["rounds"]) for each in plan.values())
    yield (
        f"{rows[0]['model']}, all five outputs, and the largest relative error of any of them "
        f"against float64; medians (quartiles) of {rounds} alternated rounds "
        f"at batch {', '.join(plan)}, against {BASELINES['encode']} in the same run; load average "
        f"{result.facts['load_average_before'][0]:.2f} at the start; {on_cpu(result)}"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _op_cells(job: dict[str, Row]) -> Iterator[str]:
    ours = next(row for row in job.values() if is_ours(row))
    yield f"{ours['op']} {ours['precision']}"
    if problem(ours):
        yield from (problem(ours), "", *("" for _ in RIVALS))
        return
    yield f"{_time(ours['median'])} ({_time(ours['low'])} to {_time(ours['high'])})"
    yield f"{ours['of_floor']:.0%} by {ours['bound']}"
    yield from (_over(job, name) for name in RIVALS)


def _over(job: dict[str, Row], rival: str) -> str:
    ours = next(row for row in job.values() if is_ours(row))
    if problem(ours):
        return "refused"
    return f"{job[rival]['median'] / ours['median']:.2f}x" if rival in job else ""


def ops(result: Result) -> Iterator[str]:
    """The engine's ops beside plain PyTorch and its compiler."""
    rows = sorted(result.rows("ops"), key=lambda row: OPS.index(row["op"]))
    timed = [row for row in rows if "not_run" not in row]
    large = [row for row in timed if row["batch"] > 1]
    jobs = pivot(large, lambda row: row["key"], lambda row: row["name"])
    yield markdown(
        [f"{large[0]['model']}, batch {large[0]['batch']}", "engine (quartiles)", "of its floor",
         *(f"over {name}" for name in RIVALS)],
        (list(_op_cells(job)) for job in jobs.values()),
    )  # fmt: skip
    single = [row for row in timed if row["batch"] == 1]
    models = list(dict.fromkeys(row["model"] for row in result.rows("ops") if row["batch"] == 1))
    table: dict[str, dict[str, dict[str, Row]]] = {}
    for row in single:
        job = table.setdefault(f"{row['op']} {row['precision']}", {})
        job.setdefault(row["model"], {})[row["name"]] = row
    yield markdown(
        ["over eager, batch 1", *models],
        ([name, *(_over(jobs[m], "eager") for m in models)] for name, jobs in table.items()),
    )
    known = ", ".join(
        f"{rate / 1e9:.1f} GB/s in a copy"
        if name == "copy"
        else f"{rate / 1e9:.0f} GFLOP/s in a {name} product of 4096 x 4096 matrices"
        for name, rate in rates(result.rows("ceilings")).items()
    )
    yield (
        f"Medians of {large[0]['rounds']} alternated rounds; floors by the same run's ceilings, "
        f"{known}: what stays in a cache can be below one. {on_cpu(result)}"
    )


def chosen(result: Result) -> dict[str, dict[int, Row]]:
    """The implementations to name where there is room for few, fastest first.

    Of each precision ours and the fastest other one that does all of the work, and plain PyTorch.
    """
    rows = [row for row in result.rows("encode") if not problem(row) and _does_all(row)]
    table = by_speed(rows)
    few = {BASELINES["encode"]}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        alike = {row["name"]: is_ours(row) for row in rows if row["precision"] == precision}
        names = [name for name in table if name in alike]
        few |= set([name for name in names if alike[name]][:1])
        peers = [name for name in names if not alike[name] and not name.startswith("reference")]
        few |= set(peers[:1])
    return {name: found for name, found in table.items() if name in few}


def _does_all(row: Row) -> bool:
    return "backbone only" not in row["name"] and "sparse and cls" not in row["name"]


def figures(result: Result) -> Iterator[str]:
    """The few figures that the top README has room for."""
    table = chosen(result)
    batches = sorted({batch for found in table.values() for batch in found})
    yield markdown(
        ["images/s", *(f"batch {batch}" for batch in batches)],
        (
            [name, *(f"{found[b]['images_per_second']:.2f}" if b in found else "" for b in batches)]
            for name, found in table.items()
        ),
    )
    yield f"{result.rows('encode')[0]['model']}, all five outputs; {on_cpu(result)}"


TABLES = {
    "cpu-encode": lambda: of_each_kind("encode", encode),
    "cpu-ops": lambda: of_each_kind("ops", ops),
    "figures": lambda: of_each_kind("encode", figures),
}
