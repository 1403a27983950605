"""The command line: `stellar-fast`.

Exit status: 0, all done; 1, an error, told in one line; 2, wrong usage; 3, `extract` finished, but
some images failed (its index has the reasons); 130, interrupted.

torch and all that needs it are imported inside the commands, so that help is quick.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Collection
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from . import answers
from .config import MODELS
from .console import Debug, Device, LocalOnly, Model, Precision, Preset, Repo, Revision, Weights
from .console import load_engine as _load
from .console import reported as _reported
from .console import say as _say
from .extract.options import Options
from .leaving import leave

if TYPE_CHECKING:
    from .engine.engine import Engine

SOME_FAILED = 3

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Sparse tokens and spatial maps of images, by the STELLAR vision transformer.",
)


def main() -> None:
    """The console script."""
    _open_streams()
    # Pillow warns of damaged metadata that change no pixel, in the middle of the progress bar.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    try:
        app(prog_name="stellar-fast")
    except SystemExit as done:
        atexit._run_exitfuncs()
        leave(done.code if isinstance(done.code, int) else int(done.code is not None))


def _open_streams() -> None:
    """Gives a process that was started without some of its three streams those of nobody: files
    that it opened would be taken for them, and written to."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        _say(f"stellar-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def models() -> None:
    """The published models and their sizes."""
    heads = ("model", "width", "layers", "heads", "patch", "tokens K", "patches P", "weights")
    rows = [
        (
            name,
            model.backbone.hidden_size,
            model.backbone.num_hidden_layers,
            model.backbone.num_attention_heads,
            model.backbone.patch_size,
            model.num_sparse_tokens,
            model.backbone.num_patches,
            model.weights,
        )
        for name, model in MODELS.items()
    ]
    table = [heads, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        _say("  ".join(cells).rstrip())


# Options of `extract` that are names with commas.
NAMES = ("features", "keep")
# What stands for the value of an option of `extract`, if not its type.
METAVARS = {
    "worker_memory": "MIB",
    "partitions": "K/N",
    "keep": "NAMES",
    "allow_protocol": "NAME",
    "allow_host": "HOST[:PORT]",
}


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the fields of `Options` as flags, in place of its `**options`.

    A collection is given by a flag that may be repeated; those of `NAMES` by names with commas.
    """
    hints = get_type_hints(Options, include_extras=True)
    (*parameters, _) = signature(command, eval_str=True).parameters.values()
    for option in dataclasses.fields(Options):
        kind, text = get_args(hints[option.name])
        default: Any = option.default
        if option.name in NAMES:
            kind, default = str, ",".join(default)
        elif kind == Collection[str]:
            kind, default = list[str], list(default)
        flag = f"--{option.name.replace('_', '-')}"  # of a switch, without its opposite
        info = typer.Option(flag, help=text, metavar=METAVARS.get(option.name))
        hint: Any = Annotated[kind, info]
        parameters.append(
            Parameter(option.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        )

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**given)

    return _declared(wrapped, parameters)


def _declared(wrapped: Callable[..., None], parameters: list[Parameter]) -> Callable[..., None]:
    """A function as typer is to see it."""
    wrapped.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {found.name: found.annotation for found in parameters}
    return wrapped


ENGINE: dict[str, tuple[Any, Any]] = {  # options that choose an engine: annotation, default
    "model": (Model, "stellar-b16"),
    "repo": (Repo, None),
    "weights": (Weights, "pretrained"),
    "precision": (Precision, "auto"),
    "device": (Device, None),
    "revision": (Revision, None),
    "local_files_only": (LocalOnly, False),
}


def _with_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `ENGINE` and --debug, in place of its argument `load`, which
    makes the engine they choose. An option that the command names too, it is also given."""
    named = signature(command, eval_str=True).parameters
    added = {**ENGINE, "debug": (Debug, False)}
    parameters = [found for name, found in named.items() if name not in ("load", *added)]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]

    @functools.wraps(command)
    def wrapped(*, debug: bool, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in ENGINE}
        given |= {name: value for name, value in chosen.items() if name in named}
        with _reported(debug):
            command(load=functools.partial(_load, **chosen), **given)

    return _declared(wrapped, parameters)


@app.command()
@_with_options
def extract(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder of images; a .txt, .csv, .tsv or .parquet list of paths; .parquet with "
            "images in it; or tars, such as 'shards/{0000..0009}.tar'. Local, or an address, such "
            "as https://, s3:// or hf://.",
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT",
            help="The folder to make, or to go on with; or its address in a store, such as s3://.",
        ),
    ],
    model: Model = "stellar-b16",
    repo: Repo = None,
    weights: Weights = "pretrained",
    precision: Precision = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "--device",
            help="cpu, cuda or cuda:N; several with commas; every GPU there is, if left out.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Of a Ray cluster; local is this machine (extra ray)."
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="List the input, write the plan, and stop.")
    ] = False,
    log_seconds: Annotated[
        float, typer.Option(help="Between lines of progress where there is no terminal.")
    ] = 30.0,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Features of many images: one .npy for each feature in every part, and index.parquet.

    The index has a line for every image: id, row in the .npy files, status, reason, width, height.
    An image that cannot be read is a line with a reason, and the exit status is then 3.

    Parts appear when they are whole. A run that was stopped, however, goes on when the same command
    is given again; given more than once at a time, the runs share the work.
    """
    with _reported(debug):
        from .extract import job as jobs
        from .extract import runner
        from .extract.failures import told_failures
        from .extract.input.addresses import shown
        from .extract.input.sieve import told as told_skipped
        from .extract.runner import Load
        from .extracting import carried_out, facts_of, prepared

        for name in NAMES:
            given = options[name].split(",")
            options[name] = [one.strip() for one in given if one.strip()]
        load: Load = functools.partial(
            _load,
            model,
            repo=repo,
            weights=weights,
            revision=revision,
            local_files_only=local_files_only,
        )
        job, load = prepared(source, output, load, precision, typer.echo, options)
        facts = facts_of(repo, revision, weights)
        if plan_only:
            names = runner.device_names(devices)
            plan = jobs.make_plan(job, jobs.decided(job, load(device=names[0])), facts)
            left = f"; left out: {told_skipped(job.skipped)}" if job.skipped else ""
            _say(
                f"{shown(output)}: {plan.images} images in {len(plan.partitions)} partitions{left}"
            )
            return
        try:
            summary = carried_out(
                job, load, devices=devices, ray=ray, facts=facts, log_seconds=log_seconds
            )
        except KeyboardInterrupt:
            _say("complete parts stay: the same command goes on from there", err=True)
            raise
        _say(f"{shown(output)}: {summary}")
        if summary.images:
            _say(f"  {summary.stages}")
        if summary.all_failed:
            reasons = f"the reasons are in {shown(output)}/part-*/index.parquet"
            _say(f"{summary.all_failed} images failed; {reasons}", err=True)
            if job.writes:
                for line in told_failures(job.output, held=job.held):
                    _say(line, err=True)
    if summary.all_failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
@_with_engine
def fidelity(
    load: Callable[..., Any],
    precision: str,
    source: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder, list or tars, as of extract.")
    ],
    preset: Preset = "card",
    images: Annotated[
        int, typer.Option(help="To compare, at most, evenly spread over IMAGES.", min=1)
    ] = 64,
    scaled_decode: Annotated[
        bool, typer.Option("--scaled-decode", help="As of extract; float32 sees images in full.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Draw the table, OUT.png, .pdf or .svg (extra viz)."),
    ] = None,
) -> None:
    """How far a precision's features are from float32, on your own images.

    fp8 and int8 are calibrated on images of their own, every second one that is taken.
    """
    from .extract.precision import read_images
    from .images.presets import least_side
    from .viz.pictures import check_picture, check_viz, save_fidelity

    if plot is not None:
        check_viz()
        check_picture(plot)
    calibrating = precision in ("fp8", "int8")
    least_side(preset, scaled_decode)
    count = images * (1 + calibrating)
    scaled = pixels = read_images(source, preset, count)
    if scaled_decode:
        scaled = read_images(source, preset, count, scaled_decode=True)
    engine = load()
    if calibrating:
        if len(pixels) < 2:
            raise ValueError(f"{source}: one image to calibrate on and one to compare at least")
        engine.calibrate(scaled[::2], preset=preset)
        pixels, scaled = pixels[1::2], scaled[1::2]
    found = engine.fidelity(scaled, preset=preset, intended=pixels)
    typer.echo(str(found))
    if plot is not None:
        save_fidelity(plot, found, f"{engine.config.name}{_synthetic(engine)}")


@app.command()
@_with_engine
def maps(
    load: Callable[..., Any],
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.png, .pdf or .svg.")],
    preset: Preset = "card",
    top: Annotated[
        int | None,
        typer.Option(help="So many maps, of the tokens with the largest shares.", min=1),
    ] = None,
) -> None:
    """The spatial maps of the sparse tokens, drawn over a photograph (extra viz)."""
    from .images.presets import check_preset
    from .images.reader import decode
    from .viz.pictures import check_picture, check_viz, save_spatial

    check_viz()
    check_preset(preset)
    check_picture(output)
    photograph = decode(image)
    engine = load()
    title = f"{engine.config.name}{_synthetic(engine)}: {image.name}"
    save_spatial(output, engine, photograph, preset, title, top)
    count = engine.config.num_sparse_tokens
    _say(f"{output}: {count if top is None else min(top, count)} maps")


@app.command()
@_with_engine
def reconstruct(
    load: Callable[..., Any],
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    output: Annotated[Path, typer.Argument(metavar="OUT.png")],
    vq_model: Annotated[
        Path | None, typer.Option(help="The MaskGIT-VQGAN tokenizer's file.")
    ] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Show the original, as the model saw it, beside it.")
    ] = False,
) -> None:
    """A photograph as its features tell it: encoded, then decoded again (preset card)."""
    from .images.presets import load_image
    from .viz.pictures import check_picture, save_beside, save_picture

    check_picture(output, (".png",))
    original = load_image(image, "card")
    engine = load(purpose="reconstruct", vq_model=vq_model)
    out = engine.reconstruct(engine.encode(original[None], outputs=("lowrank",)))
    pixels = out["reconstruction"][0]
    if beside:
        save_beside(output, original, pixels, f"reconstruction{_synthetic(engine)}")
    else:
        save_picture(output, pixels)
    _say(f"{output}: {pixels.shape[2]}x{pixels.shape[1]} pixels")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to make; must not hold anything.")] = Path(
        "stellar-demo"
    ),
    model: Model = "stellar-b16",
    debug: Debug = False,
) -> None:
    """Everything once, with no network: drawn photographs and synthetic (random) weights."""
    with _reported(debug):
        from .demo import demo as run_demo

        run_demo(out, model, say=_say)


def _synthetic(engine: Engine) -> str:
    """What a picture says of weights that mean nothing."""
    return " (synthetic weights)" if engine.weights == "synthetic" else ""


app.command()(answers.search)
app.command()(answers.probe)
