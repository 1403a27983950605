"""Puts the tables of the README between their markers, from the committed result files.

python -P benchmarks/report.py          rewrites README.md
python -P benchmarks/report.py --check  exits 1 if README.md differs from the files
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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


def cpu_encode() -> str:
    path, result = newest("cpu", "encode")
    processor, versions = result["processor"], result["versions"]
    rows = sorted(result["rows"], key=lambda row: row["median"])
    rounds = min(row["rounds"] for row in rows)
    units = "with" if processor["bf16_matrix_units"] else "without"
    peer = f", OpenVINO {versions['openvino']}" if "openvino" in versions else ""
    lines = [
        "| | images/s | against fp32 eager | s a batch, median (quartiles) |",
        "|---|---|---|---|",
        *(
            f"| {row['name']} | {row['images_per_second']:.1f} | {row['speedup']:.2f}x "
            f"| {row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f}) |"
            for row in rows
        ),
        "",
        f"{rows[0]['model']}, batch {rows[0]['batch']}, all five outputs, {rounds} "
        f"alternated rounds in one run; {processor['name']} (family {processor['family']}, model "
        f"{processor['model']}), {processor['threads']} threads, {units} bf16 matrix units; torch "
        f"{versions['torch']}{peer}; {result['date']}, commit {result['commit']}, "
        f"`benchmarks/{path.relative_to(ROOT / 'benchmarks').as_posix()}`.",
    ]
    return "\n".join(lines)


TABLES = {"cpu-encode": cpu_encode}


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


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before)
    if "--check" in sys.argv[1:]:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
