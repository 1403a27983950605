"""What `stellar-fast demo` does: every step once, on photographs and weights that it draws."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from . import photos
from .extract import make_job, run
from .extract.output.folder import check_output
from .files import writing
from .images.reader import decode
from .loading import load
from .viz.pictures import has_viz, save_spatial

PHOTOGRAPHS = 12


def demo(out: Path, model: str, say: Callable[[str], None]) -> None:
    """Draws photographs, extracts their features and draws spatial maps, all into `out`.

    Args:
        out: a folder that is not there, or empty.
        say: takes the lines that tell what was done and how long it took.

    Raises:
        ValueError: unknown model, or `out` holds something or may not be written.
        StellarError: `out` cannot be written.
    """
    out = out.resolve()
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; choose another folder with --out, or remove this one")
    check_output(out, overwrite=False)
    say(
        f"{model} with SYNTHETIC weights: random numbers, nothing was learned and nothing was "
        "downloaded. The features show shapes and speed, not meaning."
    )
    start = time.perf_counter()
    engine = load(model, weights="synthetic")
    say(f"  weights      {_since(start)}  {engine.precision} on {engine.device}")

    start = time.perf_counter()
    with writing(out):
        files = photos.write(out / "photographs", PHOTOGRAPHS)
    say(f"  photographs  {_since(start)}  {len(files)} drawn, JPEG")

    job = make_job(out / "photographs", out / "features")
    summary = run(job, engine)
    seconds = summary.seconds["total"]
    parts = sorted(path.name for path in job.output.glob("part-*"))
    say(f"  features     {seconds:6.2f} s  {', '.join(job.configuration['features'])} of {summary}")

    start = time.perf_counter()
    if has_viz():
        title = f"{model}, synthetic weights: {files[0].name}"
        save_spatial(out / "maps.png", engine, decode(files[0]), "card", title)
        say(f"  maps         {_since(start)}  {engine.config.num_sparse_tokens} spatial maps")
    else:
        say("  maps         left out: pip install 'stellar-fast[viz]' to draw spatial maps")
    say(f"{out}: {', '.join(sorted(entry.name for entry in out.iterdir()))}")
    made = ", ".join(sorted(path.name for path in (job.output / parts[0]).iterdir()))
    say(f"{job.output / parts[0]}: {made}")


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:6.2f} s"
