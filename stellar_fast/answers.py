"""The commands that answer by features which were extracted: `search` and `probe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Debug, Device, LocalOnly, Precision, Repo, Revision, load_engine, reported, say
from .errors import listing

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .recipes.queries import Found

NEAR = 5  # neighbours of a hit that a page tells

FeaturesFolder = Annotated[
    str, typer.Argument(metavar="FEATURES", help="An output folder of `stellar-fast extract`.")
]


def search(
    features: FeaturesFolder,
    queries: Annotated[
        list[str],
        typer.Argument(
            metavar="QUERY...", help="Ids of FEATURES, numbers of rows, or files of images."
        ),
    ],
    by: Annotated[
        str, typer.Option(help="cls; sparse, the mean over tokens; or token, each by itself.")
    ] = "cls",
    token: Annotated[
        int | None,
        typer.Option(help="With --by token: the queries' token to look for; each, if left out."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-k", help="Hits of a query.", min=1)] = 12,
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Show them, too: OUT.html, a page, or OUT.png, a sheet."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Where the index is kept; in FEATURES, if left out.")
    ] = None,
    factory: Annotated[
        str, typer.Option(help="The index's kind, of faiss; Flat is exact, IVF4096,PQ64 is small.")
    ] = "Flat",
    allow_protocol: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="As of extract; may be repeated.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST[:PORT]", help="As of extract; may be repeated."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For files: the model of FEATURES, if left out.")
    ] = None,
    repo: Repo = None,
    precision: Precision = "auto",
    device: Device = None,
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    debug: Debug = False,
) -> None:
    """The images of FEATURES that are nearest to others, by cosine similarity (extra recipes).

    By token, images with this part: for each token of a query, where else it is. An index is built
    once and kept, and built anew when the features are no longer those that it was built of.
    """
    with reported(debug):
        from .extract.features import open_features
        from .extract.input.addresses import Allowed
        from .recipes import gallery, kept
        from .recipes.queries import ask, read_queries
        from .recipes.search import check_by

        if out is not None:
            gallery.check_out(out)
        opened = open_features(features)
        check_by(opened, by, token)
        allowed = Allowed.of("", allow_protocol or (), allow_host or ())
        named = (Allowed.of(query).hosts for query in queries)  # as the input of extract
        allowed = Allowed(allowed.protocols, allowed.hosts.union(*named))
        synthetic = opened.configuration["weights"] == "synthetic"

        def load() -> Engine:
            return load_engine(
                model or str(opened.configuration["model"].get("name")),
                repo=repo,
                weights="synthetic" if synthetic else "pretrained",
                precision=precision,
                device=device,
                revision=revision,
                local_files_only=local_files_only,
            )

        asked = read_queries(opened, queries, by, load, allowed)
        built = kept.open_index(
            opened, by, path=index, factory=factory, say=lambda line: say(line, err=True)
        )
        near = 0 if out is None else NEAR
        found = [
            one
            for query in asked
            for one in ask(built, opened, query, count, by=by, token=token, near=near)
        ]
        for one in found:
            _tell(one)
        if synthetic:
            say(f"note: {gallery.SYNTHETIC}", err=True)
        if out is not None:
            sections = gallery.sections_of(opened, found, allowed)
            gallery.save(out, opened, by, sections)
            missing = {hit.id for one in sections for hit in one.hits if hit.jpeg is None}
            told = f"; {len(missing)} images cannot be read any more" if missing else ""
            say(f"{out}: {sum(len(one.hits) for one in sections)} hits{told}")


def _tell(found: Found) -> None:
    token = "" if found.token is None else f", token {found.token}"
    say(f"{found.query}{token}")
    for hit in found.hits:
        token = "" if hit.token is None else f"  token {hit.token:2}"
        say(f"  {hit.score:7.4f}  row {hit.row:<6}{token}  {hit.id}")
    if not found.hits:
        say("  nothing")


def probe(
    features: FeaturesFolder,
    label: Annotated[str, typer.Option(metavar="COLUMN", help="That has the labels.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="With the columns id and COLUMN; FEATURES' own, if left out."
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="The mean over tokens of sparse or dense; or cls.")
    ] = "sparse",
    held_out: Annotated[
        float, typer.Option(help="The share of each class's images that is tested on.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Of which these are.", min=0)] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", help="The confusion matrix, OUT.png, .pdf or .svg (extra viz)."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """How well the features tell labels apart: logistic regression (extra recipes).

    The accuracy is of images that were not trained on, with its 95 % Wilson interval, which is
    about the choice of images alone. Images without a label are left out, and counted.
    """
    with reported(debug):
        from .extract.features import open_features
        from .recipes.labels import labels_of
        from .recipes.probe import POOLED, pooled, probed
        from .viz.pictures import check_picture, check_viz

        if plot is not None:
            check_viz("drawing a confusion matrix")
            check_picture(plot)
        opened = open_features(features)
        if by not in POOLED or by not in opened:
            known = [name for name in POOLED if name in opened]
            raise ValueError(f"{opened.folder}: no {by} to probe; it has {', '.join(known)}")
        found = labels_of(opened, label, labels)
        say(str(found))
        rows = [row for row, value in enumerate(found.values) if value is not None]
        named = [value for value in found.values if value is not None]
        result = probed(pooled(opened, by)[rows], named, held_out=held_out, seed=seed)
        if result.single:
            count = f"{len(result.single)} classes have one image, which is trained on, not tested"
            say(f"{count}: {listing(result.single)}")
        if not result.converged:
            say("note: training did not come to its end; the accuracy could be higher", err=True)
        low, high = result.interval
        say(
            f"{by}: {len(result.classes)} classes, trained on {result.trained}, tested on "
            f"{result.tested} (seed {seed})"
        )
        say(
            f"accuracy {result.accuracy:.1%} ({result.right} of {result.tested}), 95 % Wilson "
            f"interval {low:.1%} to {high:.1%}; always the most frequent class: "
            f"{result.usual / result.tested:.1%}"
        )
        synthetic = opened.configuration["weights"] == "synthetic"
        if synthetic:
            say("note: the weights are synthetic, random numbers: nothing was learned", err=True)
        if plot is not None:
            from .viz.pictures import save_confusion

            model = str(opened.configuration["model"].get("name"))
            save_confusion(
                plot,
                result.confusion,
                result.classes,
                f"{model}{' (synthetic weights)' if synthetic else ''}, {by}: {label}\n"
                f"accuracy {result.accuracy:.1%} ({low:.1%} to {high:.1%})",
            )
            say(f"{plot}: {len(result.classes)} classes")
