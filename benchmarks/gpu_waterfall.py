"""The engine with each of its optimisations switched off, beside the whole, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu_encode
from gpu_subjects import encode_calls, engines, inputs, load, refusal
from switches import SWITCHES, Switch, without

MODEL = "stellar-h16"
BATCHES = (64, 1)
SECONDS = 1.0  # of timing a row


def measure(model: str, batch: int, precision: str, switch: Switch) -> dict[str, Any]:
    """A row: times with everything, and without one optimisation, in turn."""
    engine, sets = engines(model, precision).engine, inputs(batch)
    if switch.precision is not None:
        other = load(model, switch.precision).engine
    else:
        other = without(switch, engine)
    row: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "precision": precision,
        "switch": switch.name,
        "what": switch.what,
        "instead": switch.instead,
        "outputs": switch.outputs,
    }
    for label, subject, outputs in (
        ("full", engine, switch.outputs),
        ("without", other, switch.outputs_off),
    ):
        reason = refusal(subject, sets[0], outputs)
        if reason is not None:
            return {**row, "refused": f"{label}: {reason}"}
        if subject._graphs is not None and not gpu_encode.captures(subject):
            return {**row, "refused": f"{label}: its CUDA graph could not be captured"}
    calls = {
        "full": encode_calls(engine, sets, outputs=switch.outputs),
        "without": encode_calls(other, sets, outputs=switch.outputs_off),
    }
    row |= gpu_encode.in_turn(calls, {}, batch, seconds=SECONDS, least=10)
    return {**row, "ratio": row["without"]["median"] / row["full"]["median"]}


def jobs(precisions: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Rows by their keys; everything in bf16 before what fp8 has in common with it."""
    for precision in precisions:
        for batch in BATCHES:
            for switch in SWITCHES:
                if precision in switch.precisions:
                    yield (
                        f"{MODEL}/b{batch}/{precision}/{switch.name}",
                        lambda b=batch, p=precision, s=switch: measure(MODEL, b, p, s),
                    )
