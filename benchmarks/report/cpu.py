"""The table of single ops on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

OPS = ("patch_embed", "qkv", "attention", "proj", "fc1", "fc2", "norm", "spatial_map", "reassemble")
RIVALS = ("eager", "torch.compile", "product alone, PyTorch")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name]['median'] / row[row['ours']]['median']:.2f}x" if name in row else ""


def _lines(rows: list[dict[str, Any]], model: str, batch: int) -> Iterator[str]:
    yield (
        f"| {model}, batch {batch} | engine (quartiles) | of its floor | "
        + " | ".join(f"over {name}" for name in RIVALS)
        + " |"
    )
    yield "|---|---|---|" + "---|" * len(RIVALS)
    for row in rows:
        if "refused" in row:
            yield f"| {row['op']} {row['precision']} | refused: {row['refused']} |" + " |" * 4
            continue
        ours = row[row["ours"]]
        cells = [
            f"{_time(ours['median'])} ({_time(ours['low'])} to {_time(ours['high'])})",
            f"{row['of_floor']:.0%} by {row['bound']}",
            *(_ratio(row, name) for name in RIVALS),
        ]
        yield f"| {row['op']} {row['precision']} | " + " | ".join(cells) + " |"


def _models(rows: list[dict[str, Any]]) -> Iterator[str]:
    models = list(dict.fromkeys(row["model"] for row in rows))
    yield "| over eager, batch 1 | " + " | ".join(models) + " |"
    yield "|---|" + "---|" * len(models)
    found = {(row["op"], row["precision"], row["model"]): row for row in rows}
    for op, precision in sorted({key[:2] for key in found}, key=lambda key: OPS.index(key[0])):
        cells = []
        for model in models:
            row = found[op, precision, model]
            cells.append("refused" if "refused" in row else _ratio(row, "eager"))
        yield f"| {op} {precision} | " + " | ".join(cells) + " |"


def cpu_ops() -> str:
    """The engine's ops on a CPU beside plain PyTorch and its compiler."""
    from report import ROOT, newest  # which imports this file

    path, result = newest("cpu", "ops")
    rows = sorted(result["rows"], key=lambda row: OPS.index(row["op"]))
    processor, ceilings = result["processor"], result["ceilings"]
    rates = ", ".join(
        f"{rate / 1e9:.1f} GB/s in a copy"
        if name == "copy"
        else f"{rate / 1e9:.0f} GFLOP/s in a {name.split()[-1]} product of 4096 x 4096 matrices"
        for name, rate in ceilings.items()
    )
    large = [row for row in rows if row["batch"] > 1]
    footer = (
        f"Medians of {large[0][large[0]['ours']]['rounds']} alternated rounds; floors by the same "
        f"run's ceilings, {rates}: what stays in a cache can be below one. {processor['name']} "
        f"(family {processor['family']}, model {processor['model']}), {processor['threads']} "
        f"threads; torch {result['versions']['torch']}; {result['date']}, commit "
        f"{result['commit']}, `benchmarks/{path.relative_to(ROOT / 'benchmarks').as_posix()}`."
    )
    first = _lines(large, large[0]["model"], large[0]["batch"])
    second = _models([row for row in rows if row["batch"] == 1])
    return "\n".join([*first, "", *second, "", footer])


TABLES: dict[str, Callable[[], str]] = {"cpu-ops": cpu_ops}
PLOTS: dict[str, Callable[[], Any]] = {}
