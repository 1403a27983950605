"""Tables of what extraction takes on CPUs: for each kind of processor its newest results."""

from __future__ import annotations

from collections.abc import Iterator

from harness.results import Result
from report.cpu import of_each_kind
from report.tables import markdown, on_cpu


def fed(result: Result) -> Iterator[str]:
    """How busy the engine is kept."""
    facts = result.facts
    yield markdown(
        ["a small model, images/s", ""],
        ([row["name"], f"{row['images_per_second']:.1f}"] for row in result.rows("extract")),
    )
    yield (
        f"{facts['images']} JPEGs. Fed without reading and writing, the engine runs at "
        f"{facts['fed']['median']:.3f} of its rate on ready tensors, the median of "
        f"{len(facts['fed']['rounds'])} alternated rounds; {on_cpu(result)}"
    )


def scaled(result: Result) -> Iterator[str]:
    """`--scaled-decode` on large photographs."""
    facts = result.facts
    width, height = facts["size"]
    yield markdown(
        [f"{facts['images']} JPEGs of {width}x{height}, images/s", ""],
        (
            [f"decoded {row['name']}", f"{row['images_per_second']:.1f}"]
            for row in result.rows("scaled")
        ),
    )
    likeness = "; ".join(
        f"{name} {cosine['mean']:.6f}, least {cosine['least']:.6f}"
        for name, cosine in facts["cosine"].items()
    )
    yield (
        f"{facts['faster']['median']:.2f} times as fast, the median of "
        f"{len(facts['faster']['rounds'])} alternated rounds of {facts['distinct']} drawn "
        f"photographs under many names. Cosine between the features of both, of a small model of "
        f"random weights: {likeness}; {on_cpu(result)}"
    )


def ways(result: Result) -> Iterator[str]:
    """The default engine and int8 against float32 on PyTorch."""
    facts, rows = result.facts, result.rows("extract ways")
    besides = list(dict.fromkeys(row["key"].rsplit(" ", 1)[1] for row in rows))
    table: dict[str, list[str]] = {}
    for row in rows:
        beside = row["key"].rsplit(" ", 1)[1]
        faster = facts["faster"][f"{row['name']}, beside {beside}"]
        cell = f"{row['images_per_second']:.2f}, {faster:.2f}x"
        table.setdefault(f"{row['name']} ({row['precision']}, {row['backend']})", []).append(cell)
    heads = ["alone" if beside == "0" else f"beside {beside} busy processes" for beside in besides]
    yield markdown(
        [f"{rows[0]['key'].split('/')[0]}, images/s", *heads],
        ([name, *cells] for name, cells in table.items()),
    )
    yield f"{facts['images']} JPEGs, {' and '.join(facts['features'])}; {on_cpu(result)}"


OF = {"extract": fed, "scaled": scaled, "extract-ways": ways}
TABLES = {
    "cpu-extract": lambda: "\n\n".join(of_each_kind(name, table) for name, table in OF.items())
}
