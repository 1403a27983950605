"""What the commands share: options, lines for people, errors as one line, the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import StellarError
from .printable import printable

if TYPE_CHECKING:
    from .engine.engine import Engine

INTERRUPTED = 130  # exit status

Model = Annotated[str, typer.Option(help="A model of `stellar-fast models`, or of --repo.")]
Repo = Annotated[
    str | None,
    typer.Option(
        help="A Hub repository, or a local folder in its layout; microsoft/STELLAR if left out."
    ),
]
Weights = Annotated[
    str, typer.Option(help="pretrained; or synthetic: random ones, with no network, for trials.")
]
Preset = Annotated[
    str,
    typer.Option(help="card (resized to 224x224) or eval (shorter side 256, centre crop 224)."),
]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, fp8 (GPUs) or int8 (CPUs).")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one, if left out.")
]
Revision = Annotated[str | None, typer.Option(help="Of the Hub repository: branch, tag, commit.")]
LocalOnly = Annotated[
    bool, typer.Option("--local-files-only", help="Take weights from the cache, never the network.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def say(text: str, *, err: bool = False) -> None:
    """Prints a line; where nobody reads any longer, as behind `| head -1`, nothing."""
    try:
        typer.echo(printable(text, keep="\n"), err=err)
    except BrokenPipeError:
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, 2 if err else 1)  # or flushing at the end would fail too
        os.close(nobody)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors raised on purpose become one line on stderr and exit status 1."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        say("error: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (StellarError, ValueError, TypeError, OSError) as error:
        if debug:
            raise
        say(f"error: {printable(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from None


def load_engine(model: str, *, repo: str | None, **arguments: Any) -> Engine:
    from .loading import PUBLISHED_REPO, load

    engine = load(model, repo=repo or PUBLISHED_REPO, **arguments)
    if engine.weights == "synthetic":
        say("note: the weights are synthetic, random numbers: nothing was learned", err=True)
    return engine
