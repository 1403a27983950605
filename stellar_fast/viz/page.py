"""One HTML page of hits that needs nothing else: no network, no other file, no JavaScript to read.

Ids come from file names, which strangers choose. They are escaped; and should that fail, the page's
policy lets no script run but its own, known by its hash, and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO

import numpy as np
from PIL import Image

from ..printable import printable
from .hits import Section, Tile, veil


def page(title: str, facts: str, sections: Sequence[Section], warning: str = "") -> str:
    """The page as text, to be written as UTF-8.

    Args:
        facts: one line on what was searched.
        warning: that must be seen, such as that weights are synthetic.
    """
    style, script = _part("page.css"), _part("page.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    with_maps = any(tile.weights is not None for one in sections for tile in (one.query, *one.hits))
    toggle = (
        '<button type="button" class="maps" aria-pressed="true">show where the token is</button>'
    )
    parts = {
        "policy": policy,
        "title": _text(title),
        "facts": _text(facts),
        "warning": f'<p class="warning" role="note">{_text(warning)}</p>' if warning else "",
        "toggle": toggle if with_maps else "",
        "style": style,
        "script": script,
        "sections": "\n".join(_section(number, one) for number, one in enumerate(sections)),
    }
    return _filled(_part("page.html"), parts)


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """In one pass: what was put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _text(text: str) -> str:
    """Text from anywhere, for an element or a quoted attribute."""
    return escape(printable(text))


def _section(number: int, section: Section) -> str:
    query = section.query
    about = _about(query)
    hits = "\n".join(
        _hit(number, place, hit, section.hits) for place, hit in enumerate(section.hits)
    )
    found = f'<ol class="hits">\n{hits}\n</ol>' if hits else '<p class="none">nothing found</p>'
    return f"""<section aria-label="query {_text(query.id)}">
<div class="query">{_photo(query)}
<div><p class="label">query</p><h2>{_text(query.id)}</h2><p class="about">{_text(about)}</p></div>
</div>
{found}
</section>"""


def _hit(section: int, place: int, hit: Tile, hits: Sequence[Tile]) -> str:
    places = {one.row: at for at, one in enumerate(hits)}
    near = "".join(
        f'<li><span class="score">{score:.3f}</span> {_link(id, section, places.get(row))}</li>'
        for id, row, score in hit.near
    )
    label = f"hit {place + 1}, score {hit.score:.3f}, {hit.id}"
    id = _text(hit.id)
    about = f'data-id="{id}" data-about="{_text(_about(hit))}"'
    return f"""<li><button type="button" class="hit" id="hit-{section}-{place}" title="{id}" \
aria-label="{_text(label)}" {about}>{_photo(hit)}<span class="text">\
<span class="score">{hit.score:.3f}</span><span class="name"><bdi>{id}</bdi></span></span>\
</button><div class="near" hidden><ol>{near}</ol></div></li>"""


def _link(id: str, section: int, place: int | None) -> str:
    """A neighbour: a button where it is among the hits."""
    if place is None:
        return f"<span>{_text(id)}</span>"
    return f'<button type="button" data-to="hit-{section}-{place}">{_text(id)}</button>'


def _about(tile: Tile) -> str:
    told = [] if tile.score is None else [f"cosine {tile.score:.4f}"]
    if tile.row is not None:
        told.append(f"row {tile.row}")
    if tile.token is not None:
        told.append(f"token {tile.token}")
    if tile.weights is not None:
        share = float(tile.weights.mean())
        told.append(f"{share:.1%} of the image" if share > 0.001 else "under 0.1% of the image")
    return " · ".join(told)


def _photo(tile: Tile) -> str:
    if tile.jpeg is None:
        return f'<span class="photo gone">no picture: {_text(tile.reason)}</span>'
    width, height = tile.size
    picture = (
        f'<img class="picture" src="{_data(tile.jpeg, "jpeg")}" width="{width}" height="{height}" '
        f'alt="{_text(tile.id)}">'
    )
    if tile.weights is not None:
        picture += f'<img class="map" src="{_data(_veil(tile.weights), "png")}" alt="">'
    return f'<span class="photo"><span class="frame">{picture}</span></span>'


def _veil(weights: np.ndarray) -> bytes:
    """A PNG to lay over a photograph, a pixel a patch."""
    file = BytesIO()
    Image.fromarray(veil(weights)).save(file, "PNG")
    return file.getvalue()


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
