"""The engine with each of its optimisations switched off, beside the whole, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from gpu import encode
from gpu.subjects import encode_calls, engines, inputs, load, refusal
from gpu.switches import SWITCHES, Switch, without
from harness.results import Row

MODEL = "stellar-h16"
BATCHES = (64, 1)
SECONDS = 1.0  # of timing a row


def measure(model: str, batch: int, precision: str, switch: Switch) -> list[Row]:
    """Rows of the engine with everything, and without one optimisation, in turn."""
    engine, sets = engines(model, precision).engine, inputs(batch)
    if switch.precision is not None:
        other = load(model, switch.precision).engine
    else:
        other = without(switch, engine)
    row: Row = {
        "model": model,
        "batch": batch,
        "precision": precision,
        "switch": switch.name,
        "what": switch.what,
        "instead": switch.instead,
    }
    calls = {}
    for name, subject, outputs in (
        ("engine", engine, switch.outputs),
        ("engine without", other, switch.outputs_off),
    ):
        subject.warm_up((batch,), outputs=outputs)
        reason = refusal(subject, sets[0], outputs)
        if reason is None and subject._graphs is not None and not encode.captures(subject):
            reason = "its CUDA graph could not be captured"
        if reason is not None:
            return [{"name": name, **row, "refused": reason}]
        calls[name] = encode_calls(subject, sets, outputs=outputs)
    return encode.race(calls, {}, row, seconds=SECONDS)


def jobs(precisions: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Rows by their keys; everything in bf16 before what fp8 has in common with it."""
    for precision in precisions:
        for batch in BATCHES:
            for switch in SWITCHES:
                if precision in switch.precisions:
                    yield (
                        f"{MODEL}/b{batch}/{precision}/{switch.name}",
                        partial(measure, MODEL, batch, precision, switch),
                    )
