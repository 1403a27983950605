"""The tables and the picture of the README files, and the plots, from the committed result files.

    python -P benchmarks/report/run.py                 rewrites them
    python -P benchmarks/report/run.py --check         exits 1 where one differs from the files
    python -P benchmarks/report/run.py --plots FOLDER  draws the plots as PNG files (extra viz)

A table stands between markers named after it: all of them in benchmarks/README.md, any of them in
README.md. To add one, add a function to TABLES of `cpu.py`, `extraction.py` or `gpu.py`, and the
markers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

from harness import results
from report import cpu, extraction, gpu
from report.picture import throughput

TABLES = cpu.TABLES | extraction.TABLES | gpu.TABLES
MARKERS = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end: \1 -->", re.DOTALL)


def fill(text: str) -> str:
    """`text` with every table in it made anew.

    Raises:
        ValueError: markers of a table that there is not.
    """

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    return MARKERS.sub(table, text)


def files() -> Iterator[tuple[Path, str]]:
    """Every file that the report writes, and what belongs into it.

    Raises:
        ValueError: benchmarks/README.md lacks a table.
    """
    for path in (results.ROOT / "README.md", results.ROOT / "benchmarks" / "README.md"):
        text = path.read_text()
        missing = set(TABLES) - set(MARKERS.findall(text))
        if missing and path.parent.name == "benchmarks":
            raise ValueError(f"{path} lacks the markers of {', '.join(sorted(missing))}")
        yield path, fill(text)
    for newest in results.newest_of_each_kind("encode")[:1]:
        yield results.RESULTS / "cpu-throughput.svg", throughput(cpu.chosen(newest), newest)


def draw(folder: Path) -> list[Path]:
    """Every plot that the result files support, as PNG files in `folder`, which is made."""
    from report import plots

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in plots.figures():
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
    different = False
    for path, text in files():
        if not path.exists() or path.read_text() != text:
            different = True
            print(f"{path} {'differs from the result files' if options.check else 'written'}")
            if not options.check:
                path.write_text(text)
    return int(options.check and different)


if __name__ == "__main__":
    sys.exit(main())
