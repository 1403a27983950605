"""The commands that answer by features which were extracted: `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Debug, Device, LocalOnly, Precision, Repo, Revision, load_engine, reported, say

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
