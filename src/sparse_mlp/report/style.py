"""The style of the figures: palettes, Matplotlib settings, and export to SVG for the page and to PNG and SVG files.

Only Matplotlib's object interface is used, never pyplot: no state outlives a call. The SVG takes its greys and its two
accent colours from the page's CSS variables, so that the same drawing is readable on light and on dark.
"""

from __future__ import annotations

import functools
import io
import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

# Sentinels: in the PNG they are these colours, in the SVG the CSS variables of the same name (page.css).
INK, MUTED, GRID, SURFACE = "#20242b", "#6b727c", "#e3e5e9", "#fefefe"
BLUE, ORANGE = "#2b66b1", "#c4621a"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", BLUE: "blue", ORANGE: "orange"}

# Sixteen colours that stay apart (OKLab distance) in normal, deuteranope, protanope and tritanope sight, as simulated
# by Machado et al. 2009; tests/report/test_style.py measures it.
_EXPERTS = (
    "#2d69b4", "#e1a53c", "#3ca596", "#9b2d2d", "#a6def4", "#64166f", "#b19bff", "#9b7a00",
    "#6f4e6f", "#dede6f", "#37d3a6", "#857ad3", "#2c43a6", "#7a0037", "#bc5964", "#e96f6f",
)  # fmt: skip
RUN_STYLES: tuple[tuple[str, Any], ...] = (
    (BLUE, "-"),
    (ORANGE, "-"),
    ("#2a9d84", "-"),
    ("#a23b57", (0, (5, 1.5))),
    ("#8a68cf", (0, (5, 1.5))),
    ("#8d8a3a", (0, (1.5, 1.2))),
)

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "text.color": INK,
    "text.parse_math": False,  # class names may hold dollar signs
    "axes.unicode_minus": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "figure.facecolor": SURFACE,
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.5,
}
TITLE = "title"  # gid of the texts that a drawing for a paper leaves out
_TRIMMED: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.03}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def expert_colours(num_experts: int) -> list[str]:
    """One hex colour per expert: a colour-blind-safe set up to 16, beyond that evenly spaced along viridis."""
    if num_experts <= len(_EXPERTS):
        return list(_EXPERTS[:num_experts])
    ramp = matplotlib.colormaps["viridis"]
    return [to_hex(ramp(i / (num_experts - 1))) for i in range(num_experts)]


def panel(
    width: float = 3.75,
    height: float = 2.5,
    *,
    left: float = 0.5,
    right: float = 0.15,
    bottom: float = 0.42,
    top: float = 0.42,
) -> tuple[Figure, Axes]:
    """Return a figure with one axes whose margins are fixed in inches, so that neighbouring panels line up."""
    figure = Figure(figsize=(width, height))
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(box)
    return figure, axes


def title(axes: Axes, text: str, *, pad: float | None = None, margin: float | None = None) -> None:
    """Set the title `margin` inches left of the axes; None: at the figure's edge, where the caption begins too."""
    place, width = axes.get_position(), axes.get_figure(root=True).get_figwidth()  # type: ignore[union-attr]
    at = -(place.x0 if margin is None else margin / width) / place.width
    axes.set_title(text, x=at, pad=pad).set_gid(TITLE)


def key_above(axes: Axes, *, pad: float = 0.06, **options: Any) -> None:
    """Put the legend in one line at the right above the axes, `pad` inches away: there it covers nothing drawn."""
    height = axes.get_position().height * axes.get_figure(root=True).get_figheight()  # type: ignore[union-attr]
    entries = axes.get_legend_handles_labels()[1]
    if entries:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1 + pad / height),
            borderaxespad=0,
            borderpad=0,
            ncols=len(entries),
            columnspacing=0.9,
            handletextpad=0.4,
            **options,
        )


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that draws so that it runs under the report's Matplotlib settings, restored afterwards."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    return wrapper


def css_colour(colour: str) -> str:
    """Return the colour as the page should write it: a variable of the theme, where it is one."""
    return f"var(--{_VARIABLES[colour]})" if colour in _VARIABLES else colour


def clip(text: str, width: int) -> str:
    """Return `text` on one line and at most `width` characters long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: max(1, width - 1)].rstrip() + "…"


def wrap(text: str, width: int, lines: int = 6) -> str:
    """Return `text` in lines of at most `width` characters, broken at spaces, hyphens and underscores where it can."""
    whole = clip(text, width * lines).replace("_", "_ ")
    return "\n".join(line.replace("_ ", "_") for line in textwrap.wrap(whole, width + 1) or [""])


def save_png(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write the figure as PNG."""
    _save(figure, path, "png", dpi=dpi)


def save_svg(figure: Figure, path: Path) -> None:
    """Write the figure as SVG for a paper: without its titles, which belong into a caption there, and trimmed."""
    hidden = figure.findobj(lambda artist: artist.get_gid() == TITLE and artist.get_visible())
    for text in hidden:
        text.set_visible(False)
    try:
        _save(figure, path, "svg", salt=path.stem, metadata=_NO_METADATA, transparent=True, **_TRIMMED)
    finally:
        for text in hidden:
            text.set_visible(True)


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` for an HTML page: the theme's colours, no fixed size, ids prefixed by `name`."""
    buffer = io.StringIO()
    _save(figure, buffer, "svg", salt=name, transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', text, count=1)
    text = _unique_ids(text, name)
    text = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})\b", _themed, text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    return re.sub(r"\n\s*", "\n", text).strip()


def _save(figure: Figure, target: Path | io.StringIO, kind: str, *, salt: str = "", **options: object) -> None:
    with matplotlib.rc_context({**_RC, "svg.hashsalt": salt or "report"}), warnings.catch_warnings():
        # A class name in a script that DejaVu Sans lacks: the page's own fonts show it, only the PNG has a box there.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(target, format=kind, **options)  # type: ignore[arg-type]


def _themed(match: re.Match[str]) -> str:
    return f"{match[1]}: {css_colour(match[2])}"


def _unique_ids(svg: str, name: str) -> str:
    """Drop the ids nothing refers to and prefix the others, so that many SVGs can share one page."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r" id=\"([^\"]*)\"", lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
