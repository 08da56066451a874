"""The pieces of the HTML page. Everything that comes from a file or a caller is escaped here, nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from sparse_mlp.report.samples import Pixels, data_uri
from sparse_mlp.report.style import save_png, to_svg

NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


# Sections of a run's report: anchors and titles.
TITLES = {
    "curves": "Training",
    "map": "Where the test images lie",
    "neighbours": "Nearest neighbours",
    "classes": "Right and wrong",
    "load": "Load of the experts",
    "patches": "Where patches go",
    "channels": "Where channels go",
}


@dataclass(frozen=True)
class Figures:
    """Where a report's figures go: each is saved as PNG in `folder` and returned as HTML for the page."""

    folder: Path

    def save(self, figure: Figure, name: str) -> None:
        """Write the PNG alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(figure, self.folder / f"{name}.png")

    def add(self, figure: Figure, name: str, caption: str, *, alt: str = "", scroll: str = "") -> str:
        """Return a `<figure>`; `scroll` is "scroll" or "scroll far" where a phone is to scroll, not to shrink it."""
        self.save(figure, name)
        label = escape(alt or name.replace("_", " "), quote=True)
        svg = to_svg(figure, name.replace(".", "-"))
        return f"""<figure id="fig-{escape(name, quote=True)}">
<div class="{scroll or "plain"}" role="img" aria-label="{label}">{svg}</div>
{f"<figcaption>{escape(caption)}</figcaption>" if caption else ""}
</figure>"""


def document(title: str, body: str) -> str:
    """Return a complete page with the style sheet inside."""
    css = files("sparse_mlp.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def section(anchor: str, title: str, lead: str, *parts: str) -> str:
    """Return a titled section; `lead` says what it is about."""
    inner = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n<p class="lead">{escape(lead)}</p>\n{inner}\n</section>'


def row(figures: Iterable[str], kind: str = "") -> str:
    """Return figures side by side: three in a row, or as `kind` ("two", "wide") says."""
    return f'<div class="row {kind}">\n' + "\n".join(figures) + "\n</div>"


def headline(numbers: Sequence[tuple[str, str, str]]) -> str:
    """Return the large numbers of the top: (label, number, what to add in small)."""
    cells = "\n".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(number)}"
        + (f' <small class="under">{escape(small)}</small>' if small else "")
        + "</dd></div>"
        for label, number, small in numbers
    )
    return f'<dl class="headline">\n{cells}\n</dl>'


def facts(entries: Mapping[str, str], code: Iterable[str] = ()) -> str:
    """Return a list of terms with their values; those named in `code` are set in the typewriter face."""
    lines = []
    for term, value in entries.items():
        shown = f"<code>{escape(value)}</code>" if term in code else escape(value)
        lines.append(f"<dt>{escape(term)}</dt><dd>{shown}</dd>")
    return '<dl class="facts">\n' + "\n".join(lines) + "\n</dl>"


def notes(texts: Iterable[str]) -> str:
    return "\n".join(f'<p class="note">{escape(text)}</p>' for text in texts)


def image(pixels: Pixels, alt: str, caption: str) -> str:
    """Return a small picture with a caption."""
    return (
        f'<figure><img src="{data_uri(pixels)}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def colour_key(colours: Sequence[str], names: Sequence[str], kinds: Sequence[str] = ()) -> str:
    """Return a key of colours; `kinds` are "", "line" or "dashed"."""
    items = []
    for i, (colour, name) in enumerate(zip(colours, names, strict=True)):
        kind = kinds[i] if kinds else ""
        style = f"border-color:{colour}" if kind == "dashed" else f"background:{colour}"
        items.append(f'<li><i class="{kind or "box"}" style="{style}"></i>{escape(name)}</li>')
    return '<ul class="key">' + "".join(items) + "</ul>"


def config_table(config: Mapping[str, object]) -> str:
    """Return the whole configuration, folded away, a small table per part."""
    parts = {"recipe": {k: v for k, v in config.items() if not isinstance(v, dict)}}
    parts |= {k: v for k, v in config.items() if isinstance(v, dict)}
    tables = []
    for name, values in parts.items():
        rows = "".join(
            f"<tr><td>{escape(str(key))}</td><td>{escape(_short(value))}</td></tr>" for key, value in values.items()
        )
        tables.append(f"<section><h3>{escape(str(name))}</h3><table>{rows}</table></section>" if rows else "")
    return (
        '<details class="settings"><summary>All settings</summary>\n<div class="config">'
        + "".join(tables)
        + "</div></details>"
    )


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


def duration(seconds: float) -> str:
    """Format a time: 3 min 20 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
