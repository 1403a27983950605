"""The picture of the README: images a second on a CPU, as an SVG of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from harness.results import Result, Row

WIDTH, LEFT, BAR, GAP, TOP = 640, 200, 26, 18, 78
# Readable at a phone's width, on light and dark pages.
STYLE = """<style>
text { font: 17px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 20px }
.small { font-size: 13px; fill: #57606a }
.ours { fill: #c1272d } .other { fill: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9da7b1 } .ours { fill: #f0665f } .other { fill: #6e7681 }
}
</style>"""


def throughput(table: Mapping[str, Mapping[int, Row]], result: Result) -> str:
    """Bars of implementations, a group a batch; `table` has rows by name and batch."""
    batches = sorted({batch for rows in table.values() for batch in rows})
    most = max(row["images_per_second"] for rows in table.values() for row in rows.values())
    facts = result.facts
    model = result.rows("encode")[0]["model"]
    where = f"{facts['processor']['name']}, {facts['processor']['threads']} threads"
    lines, y = [], TOP
    for batch in batches:
        lines.append(f'<text x="0" y="{y}" class="small">batch {batch}</text>')
        y += 8
        for name, rows in table.items():
            if batch not in rows:
                continue
            rate = rows[batch]["images_per_second"]
            length = round((WIDTH - LEFT - 60) * rate / most)
            kind = "ours" if name.startswith("engine") else "other"
            label = (
                name.replace("engine", "stellar-fast")
                .replace("reference", "PyTorch")
                .replace(" max-autotune", "")
            )
            lines += [
                f'<text x="{LEFT - 8}" y="{y + 19}" text-anchor="end">{escape(label)}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length}" height="{BAR}" rx="3"/>',
                f'<text x="{LEFT + length + 6}" y="{y + 19}">{rate:.1f}</text>',
            ]
            y += BAR + 4
        y += GAP
    words = f"{facts['date']}, commit {facts['commit']}; medians, all five outputs"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" role="img" '
        f'aria-label="Images per second on a CPU">',
        STYLE,
        f'<text x="0" y="22" class="title">{model}: images per second on a CPU</text>',
        f'<text x="0" y="44" class="small">{escape(where)}</text>',
        *lines,
        f'<text x="0" y="{y}" class="small">{words}</text>',
        "</svg>\n",
    ])  # fmt: skip
