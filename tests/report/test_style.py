"""Colours that can be told apart, and SVG that takes its colours from the page."""

from __future__ import annotations

import itertools
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sparse_mlp.report import style

# How dichromats see linear RGB: Machado, Oliveira, Fernandes 2009, severity 1.
SIGHT = {
    "normal": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def oklab(colour: str, sight: str) -> np.ndarray:
    """Ottosson 2020."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    r, g, b = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    lms = np.cbrt(
        [
            0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
            0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
            0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
        ]
    )
    to_lab = [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]
    return lms @ np.array(to_lab)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(("number", "least"), [(4, 0.13), (8, 0.13), (16, 0.075)])
def test_experts_can_be_told_apart(sight: str, number: int, least: float) -> None:
    colours = style.expert_colours(number)
    assert len(set(colours)) == number
    pairs = itertools.combinations([oklab(colour, sight) for colour in colours], 2)
    assert min(float(np.linalg.norm(a - b)) for a, b in pairs) >= least


@pytest.mark.parametrize("number", [1, 17, 64])
def test_any_number_of_experts_has_colours_of_its_own(number: int) -> None:
    assert len(set(style.expert_colours(number))) == number


@style.styled
def drawing(text: str = "a") -> Figure:
    figure, axes = style.panel()
    axes.plot([0, 1], [0, 1], color=style.BLUE)
    axes.imshow([[0, 1]], extent=(0, 1, 0, 1))
    style.title(axes, text)
    return figure


def test_svg_takes_its_colours_and_fonts_from_the_page() -> None:
    svg = style.to_svg(drawing(), "one")
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>")
    assert "var(--blue)" in svg and "var(--ink)" in svg
    assert style.BLUE not in svg and style.INK not in svg
    for stranger in ("font-family", "http", "<style", "<metadata", "<!--", "<?xml"):
        assert stranger not in svg


def test_ids_of_two_figures_do_not_meet() -> None:
    first, second = (set(re.findall(r' id="([^"]+)"', style.to_svg(drawing(), name))) for name in ("one", "two"))
    assert first and second and not first & second
    svg = style.to_svg(drawing(), "one")
    referred = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert referred == first


def test_svg_is_the_same_every_time() -> None:
    assert style.to_svg(drawing(), "one") == style.to_svg(drawing(), "one")


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "--><script>", "$x^$", "a & b", "]]>"])
def test_text_is_text_in_an_svg(text: str) -> None:
    svg = style.to_svg(drawing(text), "one")
    assert "<script" not in svg
    assert text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in svg


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    style.to_svg(drawing(), "one")
    assert dict(matplotlib.rcParams) == before


def test_clip_keeps_one_short_line() -> None:
    assert style.clip("a\nb\tc\x00d", 20) == "a b c d"
    assert style.clip("abcdefghij", 5) == "abcd…"
    assert style.clip("abcde", 5) == "abcde"
