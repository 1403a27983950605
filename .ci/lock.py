"""Makes the lock files anew: what the README's two commands install beside torch, with its hash.

    python .ci/lock.py FOLDER     needs uv; FOLDER has the file of torch's CPU build for Linux

`.ci/lock.txt` is what running needs, `.ci/lock-test.txt` what testing needs beside it. Both are
installed with --no-deps. `constraints.txt` has the same versions without hashes, torch's, and those
of the benchmarks' peers; a version that it has is kept. torch is in no lock: pip would take the one
build whose hash it knows from the index, and which build fits is for the machine to say.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = "# Made by .ci/lock.py; pyproject.toml has the ranges."
BACKEND = "setuptools>=77\nwheel\n"  # what builds this package


def entries(text: str) -> dict[str, list[str]]:
    """Package -> its entries: several where the version differs between platforms."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        name = re.split(r"[=; ]", entry)[0].lower().replace("_", "-")
        if not name.startswith("#"):
            found.setdefault(name, []).append(entry)
    return found


def compiled(work: Path, folder: str, *arguments: str) -> dict[str, list[str]]:
    options = "--universal --generate-hashes --no-annotate --no-header --python-version 3.11"
    command = ["uv", "pip", "compile", "-q", *options.split(), "--find-links", folder, *arguments]
    constraints = [part for file in ("cpu.txt", "kept.txt") for part in ("-c", str(work / file))]
    done = subprocess.run(
        [*command, *constraints], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return entries(done.stdout)


def write(name: str, chosen: dict[str, list[str]]) -> None:
    lines = [line for _, found in sorted(chosen.items()) for line in found]
    (ROOT / name).write_text("\n".join([HEAD, *lines]) + "\n")


def main(folder: str) -> None:
    known = entries((ROOT / "constraints.txt").read_text())
    version = known["torch"][0].partition("==")[2]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "cpu.txt").write_text(f"torch=={version}+cpu\n")
        (work / "backend.in").write_text(BACKEND)
        kept = [line for package, found in known.items() if package != "torch" for line in found]
        (work / "kept.txt").write_text("\n".join(kept))
        sources = ("pyproject.toml", str(work / "backend.in"), "--extra=cpu", "--extra=viz")
        run = compiled(work, folder, *sources)
        everything = compiled(work, folder, *sources, "--extra=test")
    del run["torch"], everything["torch"]
    test = {package: found for package, found in everything.items() if package not in run}
    pins = {
        package: [line.partition(" \\")[0] for line in found]
        for package, found in {**run, **test}.items()
    }
    write(".ci/lock.txt", run)
    write(".ci/lock-test.txt", test)
    write("constraints.txt", {**known, **pins})


if __name__ == "__main__":
    main(sys.argv[1])
