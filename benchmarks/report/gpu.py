"""Tables of what was measured on a GPU, and of what was predicted.

A table takes the newest result file of `gpu/run.py`, and what that one lacks from older ones of the
same device, whose rows name their commit. What none has is "not measured"; where there is no file
at all, the table is one sentence that says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from harness.results import (
    COMPILED_BF16,
    EAGER_BF16,
    EAGER_FP32,
    VIT_BF16,
    Result,
    Row,
    is_ours,
    problem,
)  # fmt: skip
from report import goals
from report.tables import markdown, named, newest, newest_on_gpu, on_gpu, own, pivot

from stellar_fast.config import MODELS

COMPILING = ("compile", "compilers")  # stages
NOTHING = "Nothing has been measured on a GPU yet"
HEAD = (
    "", "images/s", "of the matrix ceiling", "times eager fp32, eager bf16",
    "times torch.compile bf16", "one image: median, 99th percentile", "peak memory",
    "load, first call", "energy an image",
)  # fmt: skip


def _of_newest(table: Callable[[Result], str], without: str) -> Callable[[], str]:
    """A table of the newest file with the run's own words below it, or why there is none."""

    def make() -> str:
        result = newest_on_gpu()
        return f"{NOTHING}{without}." if result is None else f"{table(result)}{on_gpu(result)}"

    return make


def _goals(result: Result) -> str:
    lines = goals.lines(result, newest("encode"))
    return markdown(["goal", "", "measured", "of the goal", "met"], lines) + "\n\n"


def _times(job: Row | None, ours: Row | None) -> str:
    """How many times slower than ours a rival is."""
    if job is None or ours is None or "median" not in ours:
        return ""
    return f"{job['median'] / ours['median']:.2f}x" if "median" in job else "not run"


def _compiled(result: Result, model: str, batch: int) -> tuple[str, str]:
    """The job in which a model ran beside the compiler."""
    key = f"{model}/b{batch}/compile"
    return next((job for job in ((stage, key) for stage in COMPILING) if job in result.jobs),
                (COMPILING[0], key))  # fmt: skip


def _named(row: Row) -> str:
    model, batch, precision, *rest = row["key"].split("/")
    of = f" ({row['of_commit']})" if "of_commit" in row else ""
    return " ".join([model, *rest, precision]) + f", batch {batch[1:]}{of}"


def _encode_cells(result: Result, row: Row) -> Iterator[str]:
    """The cells of HEAD but the first; empty where the row has no such figure."""
    job, batch = ("encode", row["key"]), row["batch"]
    low, high = batch / row["high"], batch / row["low"]
    yield f"{row['images_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"
    yield f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else ""
    eager = (_times(named(result, *job, name), row) for name in (EAGER_FP32, EAGER_BF16))
    yield ", ".join(filter(None, eager))
    job = _compiled(result, row["model"], batch)
    yield _times(named(result, *job, COMPILED_BF16), named(result, *job, row["name"]))
    tail = [f"{1e3 * row[k]:.2f} ms" for k in ("latency_median", "latency_p99") if k in row]
    yield ", ".join(tail)
    yield f"{row['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in row else ""
    seconds = [f"{row[k]:.1f} s" for k in ("load_seconds", "first_call_seconds") if k in row]
    yield ", ".join(seconds)
    joules = row.get("joules_per_image")
    yield f"{1e3 * joules:.1f} mJ" if joules else ("not reported" if "energy" in row else "")


def _encode(result: Result) -> str:
    """The engine end to end at the goals' points."""
    jobs = pivot(result.rows("encode"), lambda row: row["key"], lambda row: row["name"])
    if not jobs:
        return "No engine was timed in this run. "
    lines, notes = [], []
    for key, job in jobs.items():
        row = own(result, "encode", key)
        assert row is not None  # a job has ours, or one that says why there is none
        name = _named(row)
        if why := problem(row):
            lines.append([name, why.split(":")[0], *[""] * (len(HEAD) - 2)])
            notes.append(f"{name} {why}.")
            continue
        lines.append([name, *_encode_cells(result, row)])
        notes += [
            f"{name}: {n} did not run ({r['not_run']})." for n, r in job.items() if problem(r)
        ]
        if ratio := _times(job.get(VIT_BF16), row).removesuffix("not run"):
            notes.append(f"{name}: {ratio} transformers ViTModel bf16, the backbone alone.")
    compilers = (result.rows(stage, name=COMPILED_BF16) for stage in COMPILING)
    for row in itertools.chain.from_iterable(compilers):
        model, batch, _ = row["key"].split("/")
        took = problem(row) or f"took {row['compile_seconds']:.0f} s"
        notes.append(f"torch.compile of {model} at batch {batch[1:]}: {took}.")
    return markdown(HEAD, lines) + "\n\n" + "".join(f"{note} " for note in notes)


def _figures(result: Result) -> str:
    """What a user asks first: images a second, and the time of one image."""
    lines = []
    for model in MODELS:
        for precision in ("bf16", "fp8"):
            row = goals.encoded(result, model, 64, precision)
            if row is None or "median" not in row:
                continue
            job = ("encode", row["key"])
            one = goals.encoded(result, model, 1, precision) or {}
            lines.append([
                f"{model} {precision}",
                f"{row['images_per_second']:,.0f}",
                _times(named(result, *job, EAGER_BF16), row),
                _times(named(result, *job, EAGER_FP32), row),
                f"{1e3 * one['latency_median']:.2f} ms" if "latency_median" in one else "",
            ])  # fmt: skip
    head = ["batch 64", "images/s", "over eager bf16", "over eager fp32", "one image"]
    facts = result.facts
    return markdown(head, lines) + f"\n\n{facts['device']}, all five outputs. "


def _figures_table() -> str:
    result = newest_on_gpu()
    if result is None:
        return f"{NOTHING}."
    newest_commit = result.facts["commit"]
    commits = {str(row.get("of_commit", newest_commit)) for row in result.rows("encode")}
    return (
        f"{_figures(result)}Commits {', '.join(sorted(commits))}; files in "
        f"`benchmarks/results/{result.path.parent.name}`."
    )


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


def _predicted_op(op: str, rows: Sequence[Row]) -> float | None:
    """Predicted seconds of one op of a forward; the spatial map is three launches."""
    if op == "spatial_map":
        wanted = [row for row in rows if row["op"] in ("sparse_proj", "similarity", "spatial")]
        last = {row["op"]: row["seconds"] for row in wanted}  # the first sparse_proj is a query's
        return sum(last.values()) if len(last) == 3 else None
    # In FP8 the first block's and the last one's are bf16: the kind that most blocks have.
    kinds = [row for row in rows if row["op"] == op]
    return max(kinds, key=lambda row: row.get("times", 1))["seconds"] if kinds else None


def _kernel_cells(result: Result, row: Row, guess: float | None) -> Iterator[str]:
    key, median = row["key"], row["median"]
    floor = "floor" in row
    yield _microseconds(median)
    yield f"{_microseconds(row['floor'])} ({row['bound']})" if floor else ""
    yield f"{row['of_floor']:.0%}" if floor else ""
    yield "" if guess is None else f"{_microseconds(guess)} ({guess / median:.2f}x)"
    against = {}
    for job in (key, f"{key}/compile"):
        ours = own(result, "ops", job)
        for rival in result.jobs.get(("ops", job), []):
            if not is_ours(rival) and (text := _times(rival, ours)):
                against[rival["name"]] = text.replace("not run", "did not run")
    yield "; ".join(f"{name} {text}" for name, text in against.items())


def _kernels(result: Result) -> str:
    """Each kernel beside its floor, its prediction and its rivals."""
    found = (own(result, *job) for job in result.jobs if job[0] == "ops")
    rows = [row for row in found if row and not row["key"].endswith("/compile")]
    if not rows:
        return "No kernel was timed in this run. "
    predictions = newest("predicted") if "H200" in result.facts["device"] else None
    lines = []
    for row in rows:
        if why := problem(row):
            lines.append([_named(row), why, *[""] * 4])
            continue
        guess = None
        if predictions is not None:
            same = {name: row[name] for name in ("model", "batch", "precision")}
            guess = _predicted_op(row["op"], predictions.rows("predicted", arch=90, **same))
        lines.append([_named(row), *_kernel_cells(result, row, guess)])
    modes = sorted({r["compile_mode"] for r in result.rows("ops") if "compile_mode" in r})
    note = f"torch.compile in mode {', '.join(modes)}. " if modes else ""
    head = ["kernel", "time", "floor (bound by)", "floor / time",
            "PREDICTED time (of the measured)", "speed-up over"]  # fmt: skip
    return markdown(head, lines) + "\n\n" + note


def switched_off(result: Result) -> dict[str, dict[tuple[str, int], dict[str, Row]]]:
    """Rows by switch, then precision and batch, then name; what brings most at any point first.

    The row without an optimisation has `ratio`: its time as a multiple of the engine's.
    """
    table: dict[str, dict[tuple[str, int], dict[str, Row]]] = {}
    for row in result.rows("waterfall"):
        if "switch" in row:
            points = table.setdefault(row["switch"], {})
            points.setdefault((row["precision"], row["batch"]), {})[row["name"]] = row
    for points in table.values():
        for job in points.values():
            if "median" in job.get("engine without", {}):
                ratio = job["engine without"]["median"] / job["engine"]["median"]
                job["engine without"] = job["engine without"] | {"ratio": ratio}

    def gain(switch: str) -> float:
        rows = [row for job in table[switch].values() for row in job.values()]
        return max(row.get("ratio", 0.0) for row in rows)

    return {switch: table[switch] for switch in sorted(table, key=gain, reverse=True)}


def _switch_cell(job: dict[str, Row] | None) -> str:
    if job is None:
        return ""
    if any(map(problem, job.values())):
        return "refused"
    full, without = job["engine"], job["engine without"]
    times = f"{1e3 * full['median']:.2f} to {1e3 * without['median']:.2f} ms"
    return f"{times}, {without['ratio']:.2f}x"


def _waterfall(result: Result) -> str:
    """What each optimisation brings."""
    table = switched_off(result)
    if not table:
        return "No optimisation was switched off in this run. "
    points = list(dict.fromkeys(point for jobs in table.values() for point in jobs))
    heads = [f"{precision}, batch {batch}" for precision, batch in points]
    lines = []
    for jobs in table.values():
        some = next(row for job in jobs.values() for row in job.values())
        cells = [_switch_cell(jobs.get(point)) for point in points]
        lines.append([some["what"], some["instead"], *cells])
    return (
        markdown(["switched off", "instead", *heads], lines)
        + f"\n\n{some['model']}, one at a time. "
    )


def predicted_now() -> str:
    """What kernels that no GPU has measured yet would bring, beside those that one has."""
    found, before = newest("predicted-unmeasured"), newest("predicted")
    if found is None or before is None:
        return "Nothing has been predicted of kernels that were not measured."
    guesses = {g["key"]: g for g in before.rows("predicted", op="forward", arch=90)}
    lines = [
        [
            f"{g['model']} {g['precision']}, batch {g['batch']}",
            f"{1e3 * guesses[g['key']]['seconds']:.3g} ms", f"{1e3 * g['seconds']:.3g} ms",
            f"{g['seconds'] / guesses[g['key']]['seconds'] - 1:+.0%}",
        ]
        for g in found.rows("predicted", op="forward", arch=90)
        if g["key"] in guesses
    ]  # fmt: skip
    old, new = before.facts["commit"], found.facts["commit"]
    head = ["PREDICTED, not measured", f"commit {old}", f"commit {new}", "change"]
    return markdown(head, lines) + (
        f"\n\nKernels of {new}, which no GPU has measured, by the tuned tiles, and those of the "
        f"table above; triton {found.facts['versions']['triton']}."
    )


def predicted() -> str:
    """What the machine code makes of the models on an H200."""
    found, measured = newest("predicted"), newest_on_gpu()
    if found is None:
        return "Nothing has been predicted."
    if measured is not None and "H200" not in measured.facts["device"]:
        measured = None
    lines = []
    for guess in found.rows("predicted", op="forward", arch=90):
        model, precision, batch = guess["model"], guess["precision"], guess["batch"]
        real = measured and goals.encoded(measured, model, batch, precision)
        cells = ["not measured", ""]
        if real and "median" in real:
            error = guess["seconds"] / real["median"] - 1
            cells = [f"{1e3 * real['median']:.3g} ms", f"{error:+.0%}"]
        rate = float(f"{guess['images_per_second']:.3g}")
        lines.append([
            f"{model} {precision}, batch {batch}", f"{1e3 * guess['seconds']:.3g} ms",
            f"{rate:,.0f}", f"{1e3 * guess['floor']:.3g} ms", *cells,
        ])  # fmt: skip
    chip, facts = found.facts["chips"]["90"], found.facts
    head = ["PREDICTED, not measured", "time", "images/s", "floor", "measured", "error"]
    return markdown(head, lines) + (
        f"\n\nPredicted for an {chip['name']} from the kernels' machine code by "
        f"`benchmarks/audit/predict.py`, which says what it assumes: {chip['matrix'] / 1e12:.0f} "
        f"TFLOP/s bf16, {chip['copy'] / 1e12:.1f} TB/s ({chip['source']}); kernels of "
        f"{facts['date']}, commit {facts['commit']}, triton {facts['versions']['triton']}."
    )


def _among(rows: Sequence[Row], field: str) -> str:
    """The smallest and the largest value of a field that rows have."""
    found = sorted({row[field] for row in rows if row.get(field) is not None})
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else "".join(map(str, found))


def predicted_elsewhere() -> str:
    """What the machine code for other GPUs is, and what it makes of H/14 there."""
    found = newest("predicted")
    guesses = found.rows("predicted", op="forward") if found else []
    guesses = [guess for guess in guesses if guess["arch"] != 90]
    if found is None or not guesses:
        return "Nothing has been predicted for other GPUs."
    lines = []
    for guess in guesses:
        rows = [row for row in found.jobs["predicted", guess["key"]] if row["op"] != "forward"]
        matrix = [row for row in rows if row.get("under_way") is not None]
        lines.append([
            f"sm_{guess['arch']}, {guess['chip']}",
            f"{guess['model']} {guess['precision']}, batch {guess['batch']}",
            f"{1e3 * guess['seconds']:.3g} ms", f"{guess['floor'] / guess['seconds']:.0%}",
            f"{max(row['shared'] for row in rows) / 1024:.0f} KiB", _among(matrix, "under_way"),
            f"{_among(rows, 'before')}, {_among(rows, 'each')}, {_among(rows, 'after')}",
            str(sum(row["stack"] > 0 for row in rows)),
        ])  # fmt: skip
    head = ["PREDICTED, not measured", "", "time", "of its ceiling", "most shared memory",
            "passes under way", "trips to the memory before, in, behind the main loop",
            "kernels that spill"]  # fmt: skip
    facts = found.facts
    return markdown(head, lines) + (
        "\n\nBy the heuristics' tiles, which no such GPU has tuned, read from their machine code; "
        "the ceiling is the longer of FLOPs at 80 % of the data sheet's rate and bytes at 90 % of "
        f"its bandwidth. Commit {facts['commit']}, triton {facts['versions']['triton']}."
    )


TABLES = {
    "gpu-figures": _figures_table,
    "gpu-goals": _of_newest(_goals, ", so no goal for one can be met or missed yet"),
    "gpu-encode": _of_newest(_encode, ": how many images a second the engine encodes is not known"),
    "gpu-kernels": _of_newest(_kernels, ": no kernel has a time"),
    "gpu-waterfall": _of_newest(_waterfall, ": what each optimisation brings is not known"),
    "predicted": predicted,
    "predicted-now": predicted_now,
    "predicted-elsewhere": predicted_elsewhere,
}
