"""The picture of spatial maps: each map in its panel, over the part of the photograph it is of."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import photograph
from PIL import Image

from stellar_fast import images
from stellar_fast.errors import MissingExtraError
from stellar_fast.images.seen import seen
from stellar_fast.viz import plots

ROWS, COLUMNS = 3, 5


def spatial(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS * COLUMNS, tokens, generator=generator).mul(3).softmax(dim=1)


@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 24])
def test_every_map_has_its_panel(tokens):
    maps = spatial(tokens).numpy().reshape(ROWS, COLUMNS, tokens)
    picture = photograph(60, 40)
    figure = plots._draw(picture, maps, "a title")
    assert figure.get_suptitle() == "a title"
    panels = [axis for axis in figure.axes if axis.images]
    assert (np.asarray(panels[0].images[0].get_array()) == np.asarray(picture)).all()
    assert len(panels) == tokens + 2
    limits = set()
    for token, panel in enumerate(panels[2:]):
        shown = panel.images[1]
        assert (np.asarray(shown.get_array()) == maps[:, :, token]).all()
        assert panel.get_title() == f"■ token {token}: {maps[:, :, token].mean():.0%}"
        assert tuple(shown.get_extent()) == (0, 60, 40, 0), "stretched over the photograph"
        limits.add(shown.get_clim())
    assert len(limits) == 1, "one colour scale for all"
    low, high = limits.pop()
    if tokens > 1:  # matplotlib widens an empty range
        assert (low, high) == pytest.approx((maps.min(), maps.max()))


def test_the_strongest_token_has_its_titles_colour():
    maps = spatial(8).numpy().reshape(ROWS, COLUMNS, 8)
    figure = plots._draw(photograph(), maps, "")
    panels = [axis for axis in figure.axes if axis.images]
    colours = np.asarray(panels[1].images[1].get_array())
    strongest = maps.argmax(axis=2)
    for row in range(ROWS):
        for column in range(COLUMNS):
            title = panels[2 + strongest[row, column]].title.get_color()
            assert np.allclose(np.asarray(title), colours[row, column] * 0.8)
    assert len({tuple(np.round(panel.title.get_color(), 3)) for panel in panels[2:]}) == 8


@pytest.mark.parametrize("top", [1, 3, 8, 99])
def test_the_tokens_with_the_largest_shares(top):
    maps = spatial(8).numpy().reshape(ROWS, COLUMNS, 8)
    figure = plots._draw(photograph(60, 40), maps, "", top)
    panels = [axis for axis in figure.axes if axis.images][2:]
    order = np.argsort(-maps.mean(axis=(0, 1)))[:top]
    assert [int(re.search(r"\d+", panel.get_title())[0]) for panel in panels] == order.tolist()
    for token, panel in zip(order, panels, strict=True):
        assert (np.asarray(panel.images[1].get_array()) == maps[:, :, token]).all()
        colour = plots.token_colours(8)[token] * 0.8
        assert np.allclose(np.asarray(panel.title.get_color()), colour), "as in all pictures"


@pytest.mark.parametrize(
    ("suffix", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")]
)
def test_the_suffix_decides_the_format(suffix, begins, tmp_path):
    written = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.{suffix}"
        plots.save_maps(path, photograph(60, 40), spatial(4), (ROWS, COLUMNS), "maps")
        written.append(path.read_bytes())
    assert written[0].startswith(begins)
    assert written[0] == written[1], "there is a date in it"


def test_the_letters_of_a_pdf_are_outlines_that_printers_take(tmp_path):
    path = tmp_path / "a.pdf"
    plots.save_maps(path, photograph(60, 40), spatial(4), (ROWS, COLUMNS), "maps")
    assert b"/Type3" not in path.read_bytes()
    assert b"/TrueType" in path.read_bytes() or b"/CIDFontType2" in path.read_bytes()


def test_a_title_is_no_formula(tmp_path):
    """Nor does it hide what a file is called."""
    path = tmp_path / "a.png"
    plots.save_maps(path, photograph(), spatial(4), (ROWS, COLUMNS), "$\\frac$ a$b$\u202e.jpg")
    maps = spatial(4).numpy().reshape(ROWS, COLUMNS, 4)
    assert plots._draw(photograph(), maps, "$x$\u202e").get_suptitle() == "$x$\\u202e"


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (300, 20), (20, 300)])
def test_a_png_is_written(size, tmp_path):
    path = tmp_path / "maps.png"
    plots.save_maps(path, photograph(*size), spatial(4), (ROWS, COLUMNS), "maps")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 1000, "nothing was drawn"


def test_constant_maps_and_other_dtypes_are_drawn(tmp_path):
    flat = torch.full((ROWS * COLUMNS, 4), 0.25)
    for index, maps in enumerate((flat, flat.bfloat16(), flat.numpy(), flat.requires_grad_())):
        path = tmp_path / f"{index}.png"
        plots.save_maps(path, photograph(), maps, (ROWS, COLUMNS), "flat")
        assert path.stat().st_size > 1000


@pytest.mark.parametrize("shape", [(14, 4), (16, 4), (15,), (1, 15, 4)])
def test_maps_of_another_shape_are_refused(shape, tmp_path):
    with pytest.raises(ValueError, match=r"\(3 x 5, K\), got"):
        plots.save_maps(tmp_path / "a.png", photograph(), torch.zeros(shape), (ROWS, COLUMNS), "")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[viz\]"):
        plots.save_maps(tmp_path / "a.png", photograph(), spatial(4), (ROWS, COLUMNS), "")


def test_neither_pyplot_nor_a_backend_is_touched(tmp_path):
    code = f"""
import sys, numpy as np
from PIL import Image
from stellar_fast.viz import plots
assert "matplotlib" not in sys.modules
maps = np.full((4, 2), 0.5, np.float32)
plots.save_maps({str(tmp_path / "a.png")!r}, Image.new("RGB", (9, 9)), maps, (2, 2), "")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_seen_is_what_the_preset_shows():
    picture = photograph(640, 400)
    whole = seen(picture, "card")
    assert whole.size == (512, 320)
    assert seen(photograph(60, 40), "card").size == (60, 40)
    crop = seen(picture, "eval")
    assert crop.size == (350, 350)
    model_input = images.apply_preset(picture, "eval").mul(255).byte()
    shown = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(shown.astype(int) - model_input.numpy()).mean() < 2
    with pytest.raises(ValueError, match="unknown preset"):
        seen(picture, "square")
