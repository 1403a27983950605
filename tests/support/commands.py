"""Running the command line, and a local repository of small models for it."""

import re
import sys
from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint, write_vqgan
from engines import SMALL
from typer.testing import CliRunner

from stellar_fast import cli


def write_models(root: Path, *, tokenizer: bool = True) -> Path:
    """A local folder in the published layout: two small models, and the tokenizer, whose 54 million
    numbers take a second."""
    geometry: dict[str, Any] = {"backbone": SMALL, "num_sparse_tokens": 8, "num_decoder_layers": 1}
    write_checkpoint(root, "small", **geometry)
    write_checkpoint(root, "pixel", pixel_head=True, **geometry)
    if tokenizer:
        write_vqgan(root / "vq.safetensors", seed=7)
    return root


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def small(repo: Path, model: str = "small") -> tuple:
    return ("--repo", repo, "--model", model, "--precision", "fp32", "--device", "cpu")


def command(*arguments) -> list[str]:
    return [sys.executable, "-P", "-m", "stellar_fast", *map(str, arguments)]


def refused(result, pattern: str) -> None:
    """One line on stderr, exit status 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(pattern, result.stderr), result.stderr
