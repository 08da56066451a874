"""Pages: the templates, their data, and the format of numbers. Jinja escapes every text."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from sparse_mlp.files import replacing
from sparse_mlp.report.samples import Pixels, data_uri
from sparse_mlp.report.style import save_png, save_svg, to_svg

NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


# Titles of the sections by anchor.
TITLES = {
    "last": "Last evaluation",
    "curves": "Training",
    "map": "Where the test images lie",
    "neighbours": "Nearest neighbours",
    "classes": "Right and wrong",
    "iou": "Classes",
    "ap": "Classes",
    "examples": "Best and worst",
    "load": "Load of the experts",
    "capacity": "Less computation",
    "explore": "Explore the routing",
    "patches": "Where patches go",
    "channels": "Where channels go",
    "accuracy": "On the test set",
    "loss": "Training loss",
}


@dataclass(frozen=True)
class Drawing:
    """A figure on a page. `scroll` is "scroll" or "scroll far" where a narrow screen scrolls it, not shrinks it."""

    name: str
    svg: Markup
    caption: str
    alt: str
    scroll: str


@dataclass(frozen=True)
class Picture:
    """A small image on a page; `uri` holds its pixels."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Swatch:
    """One entry of a colour key; `kind` is "box", "line" or "dashed"."""

    colour: str
    name: str
    kind: str = "box"


@dataclass(frozen=True)
class Tile:
    """One of the large numbers at the top."""

    label: str
    number: str
    small: str = ""


@dataclass(frozen=True)
class Head:
    """The top of every page; `facts` are (term, value, whether it is code)."""

    kind: str
    title: str
    subtitle: str = ""
    tiles: list[Tile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[tuple[str, str, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """Where a report's figures go: each is saved in `folder` as PNG and, without its title, as SVG."""

    folder: Path

    def save(self, figure: Figure, name: str) -> None:
        """Write the files alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(figure, self.folder / f"{name}.png")
        save_svg(figure, self.folder / f"{name}.svg")

    def add(self, figure: Figure, name: str, caption: str, *, alt: str = "", scroll: str = "plain") -> Drawing:
        """Write the files and return the figure for the page."""
        self.save(figure, name)
        svg = Markup(to_svg(figure, name.replace(".", "-")))  # Matplotlib has escaped its texts
        return Drawing(name, svg, caption, alt or name.replace("_", " "), scroll)


def write_page(target: Path, template: str, head: Head, **context: object) -> Path:
    """Fill a template and write the page in one piece; returns its path. `sections` become the page's links."""
    defaults = {"sections": {}, "settings": {}, "titles": TITLES, "page_title": head.title}
    text = _templates().get_template(template).render(head=head, **(defaults | context))
    with replacing(target) as temporary:
        # a file name that is not UTF-8 has surrogates
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return target


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("sparse_mlp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["NONE"] = NONE
    return environment


def image(pixels: Pixels, alt: str, caption: str, *, photo: bool = False) -> Picture:
    """Return a small picture with a caption; a `photo` is stored with loss."""
    return Picture(data_uri(pixels, photo=photo), alt, caption)


def settings(config: Mapping[str, object]) -> dict[str, list[tuple[str, str]]]:
    """Return the configuration as (name, value) by part; what belongs to no part comes first."""
    parts = {"recipe": {k: v for k, v in config.items() if not isinstance(v, dict)}}
    parts |= {k: v for k, v in config.items() if isinstance(v, dict)}
    return {str(name): [(str(key), _short(value)) for key, value in part.items()] for name, part in parts.items()}


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)


def count(number: float | None) -> str:
    """Format a large number to three digits: 1.23 M."""
    if number is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = f"{number / size:#.3g}".rstrip(".") if number < 999.5 * size else f"{number / size:,.0f}"
            return f"{digits} {unit}"
    return f"{number:.0f}"


def duration(seconds: float | None) -> str:
    """Format a time: 3 min 20 s."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
