"""Lint and types."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint():
    check("ruff", "check")
    check("ruff", "format", "--check")


def test_types(tmp_path):
    """mypy over the package as it installs, since it knows nothing of setuptools' package-dir; and
    over the benchmarks and what the tests share, which are no packages."""
    package = tmp_path / "stellar_fast"
    package.mkdir()
    for item in (ROOT / "stellar_fast").iterdir():
        (package / item.name).symlink_to(item)
    for name in ("kernels", "reference"):
        (package / name).symlink_to(ROOT / name)
    folders = [ROOT / "benchmarks", ROOT / "tests" / "support"]
    modules = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if not path.name.startswith("test_"):
                modules += ["-m", ".".join(path.relative_to(folder).with_suffix("").parts)]
    # What it knows of torch, most of its work, is kept for the next time.
    cache = str(ROOT / ".mypy_cache")
    config = str(ROOT / "pyproject.toml")
    arguments = ("--config-file", config, "--cache-dir", cache, "--explicit-package-bases")
    path = os.pathsep.join(map(str, (tmp_path, *folders)))
    check("mypy", *arguments, "-p", "stellar_fast", *modules, cwd=tmp_path, MYPYPATH=path)
