"""Classes of pixels as colours over a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sparse_mlp.report.samples import Pixels

__all__ = ["class_colours", "colour_map", "overlay", "with_legend"]

_ALPHA = 0.6  # of the colours over the picture
_GREY = (128, 128, 128)  # of pixels that count for nothing


def class_colours(classes: int) -> NDArray[np.uint8]:
    """(classes, 3): distinct colours, the first twenty those of Matplotlib's tab20 with the strong ones first."""
    strong = [*range(0, 20, 2), *range(1, 20, 2)]
    colours = [colormaps["tab20"].colors[i] for i in strong]  # type: ignore[attr-defined]
    for number in range(len(colours), classes):  # the golden ratio keeps neighbours apart
        colours.append(
            colorsys.hsv_to_rgb(number * 0.618 % 1, 0.45 + 0.5 * (number % 3) / 2, 0.95 - 0.3 * (number % 2))
        )
    return np.round(255 * np.array(colours[:classes])).astype(np.uint8)


def colour_map(found: NDArray[np.integer], classes: int) -> Pixels:
    """(H, W) classes -> (H, W, 3) colours; what is no class is grey."""
    table = np.full((256, 3), _GREY, dtype=np.uint8)
    table[:classes] = class_colours(classes)
    return table[found]


def overlay(image: Image.Image, found: NDArray[np.integer], classes: int) -> Image.Image:
    """The picture with the colours of its pixels' classes (H, W) over it."""
    colours = Image.fromarray(colour_map(found, classes))
    return Image.blend(image.convert("RGB"), colours, _ALPHA)


def with_legend(picture: Image.Image, found: NDArray[np.integer], names: Sequence[str]) -> Image.Image:
    """The picture with the classes that it has below it, the largest first, each with its share."""
    counts = np.bincount(found.ravel(), minlength=len(names))[: len(names)]
    order = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
    texts = [f"{names[c]} {100 * counts[c] / found.size:.1f} %" for c in order]
    font = ImageFont.load_default(size=max(12, min(picture.size) // 28))
    line = round(1.6 * font.size)  # type: ignore[union-attr]
    places, x, y = [], line // 2, line // 2
    for text in texts:
        width = line + round(font.getlength(text)) + line
        if x > line // 2 and x + width > picture.width:
            x, y = line // 2, y + line
        places.append((x, y))
        x += width
    page = Image.new("RGB", (picture.width, picture.height + y + line + line // 2), "white")
    page.paste(picture)
    draw, colours = ImageDraw.Draw(page), class_colours(len(names))
    for text, c, (left, top) in zip(texts, order, places, strict=True):
        top += picture.height
        draw.rectangle((left, top, left + line // 2, top + line // 2), fill=tuple(int(v) for v in colours[c]))
        draw.text((left + round(0.75 * line), top + line // 4), text, fill="black", font=font, anchor="lm")
    return page
