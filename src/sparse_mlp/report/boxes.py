"""Objects drawn over a picture: boxes, masks and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparse_mlp.report.overlay import class_colours
from sparse_mlp.report.style import clip

__all__ = ["draw_objects"]

_MASK_SHARE = 0.45  # of the colour over the picture
_LONGEST_NAME = 28


def draw_objects(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    classes: int,
    masks: np.ndarray | None = None,
) -> Image.Image:
    """A copy of an RGB image with boxes (N, 4) x1, y1, x2, y2 in its pixels, masks (N, height, width) and captions.

    Colours are those of the objects' classes, `labels` (N,), of which there are `classes`.
    """
    table = class_colours(classes)
    colours = [(int(r), int(g), int(b)) for r, g, b in (table[label] for label in labels)]
    pixels = np.array(image, dtype=np.float32)
    for mask, colour in zip(masks if masks is not None else (), colours, strict=masks is not None):
        inside = mask.astype(bool)
        pixels[inside] = (1 - _MASK_SHARE) * pixels[inside] + _MASK_SHARE * np.array(colour, dtype=np.float32)
    drawn = Image.fromarray(np.rint(pixels).astype(np.uint8))
    draw, side = ImageDraw.Draw(drawn), max(image.size)
    width, font = max(1, round(side / 320)), _font(max(10, round(side / 42)))
    # Small objects last: their captions are not hidden by those of the objects that they lie in.
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) if len(boxes) else np.zeros(0)
    for number in np.argsort(-area, kind="stable"):
        x1, y1, x2, y2 = (float(value) for value in boxes[number])
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colours[number], width=width)
        _caption(draw, (x1, y1), clip(captions[number], _LONGEST_NAME), colours[number], font, image.size)
    return drawn


def _caption(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Text on a patch of the colour above the corner of a box, or inside of it at the upper border of the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    dark = sum(share * value for share, value in zip((0.299, 0.587, 0.114), colour, strict=True)) < 140
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2 - left, y + 2 - top), text, font=font, fill=(255, 255, 255) if dark else (0, 0, 0))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
