"""The section to explore the routing in: its data as compact JSON, which templates/routing.js draws.

Arrays are bytes in base64. What the script reads: `images`, and `patches` and `channels`, a dictionary a layer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from torch import nn

from sparse_mlp.report.pictures import full_scale
from sparse_mlp.report.predictions import Floats
from sparse_mlp.report.routing import ChannelRouting, PatchRouting, Traced
from sparse_mlp.report.samples import SMALL, Samples, data_uri, picture
from sparse_mlp.report.style import expert_colours
from sparse_mlp.report.vocabulary import CROP, ImageSource, Vocabulary, vocabularies

_SIDE = 320  # pixels of a picture to explore, at most
_SCORES = 1_000_000  # bytes of all scores together; of larger models fewer pictures are shown
_CROPS = 1_600  # crops of all vocabularies together
_FILTERS = 60_000  # bytes of one layer's spatial filters
_WORK = 5e11  # multiply-adds spent on the vocabulary: some seconds to a minute of a CPU
_MOST = 10_000  # images that the vocabulary is taken from
MAX_PICTURES = 24


@dataclass(frozen=True)
class ExploreSection:
    """`data` is JSON; `unplaced` are layers, with the reason, that cannot be drawn on an image."""

    lead: str
    data: Markup
    patches: bool
    channels: bool
    filters_lead: str = ""
    unplaced: list[tuple[str, str]] = field(default_factory=list)


def explore_section(
    model: nn.Module, samples: Samples, titles: Sequence[tuple[str, str]], traced: Traced, source: ImageSource | None
) -> ExploreSection | None:
    """What can be explored of `traced`, the routing of the samples; None of a dense model.

    titles: of each sample, its name and what the model takes it for. source: what vocabularies are taken from.
    """
    if not (traced.patches or traced.channels or traced.unplaced):
        return None
    size = sum(layer.shares[0].size for layer in traced.patches)
    shown = max(1, min(len(samples.images), MAX_PICTURES, _SCORES // max(1, size)))
    images = [_image(samples, row, title) for row, title in enumerate(titles[:shown])]
    experts = sum(layer.num_experts for layer in traced.patches)
    words = {}
    if source is not None and traced.patches:
        words = vocabularies(model, source, int(np.clip(_CROPS // max(1, experts), 4, 24)))
    data = {
        "images": images,
        "patches": [_patch_layer(layer, shown, words.get(layer.layer), source) for layer in traced.patches],
        "channels": [_channel_layer(layer) for layer in traced.channels if layer.filters is not None],
        "crop": CROP,
        "looked": len(source.indices) if source is not None else 0,
        "total": source.total if source is not None else 0,
    }
    mixed = any(not layer.exact for layer in traced.patches)
    return ExploreSection(
        _LEAD + (_MIXED if mixed else _EXACT) if traced.patches else "",
        embed(data),
        bool(data["patches"]),
        bool(data["channels"]),
        _FILTERS_LEAD + (_FILTERS_MIXED if mixed else ""),
        list(traced.unplaced.items()),
    )


_LEAD = (
    "Choose an image, a layer and an expert. Point at a patch, or move over the picture with the arrow keys, to see "
    "what every layer does with it; a click or Enter holds the patch. "
)
_EXACT = (
    "Filled squares are patches that went to the expert, outlined ones those that did not; the larger, the higher the "
    "router's score."
)
_MIXED = (
    "These layers route re-represented tokens, each a learned mix of all patches: drawn is an attribution, how far the "
    "expert's share in a patch lies above its mean over the image."
)
_FILTERS_LEAD = (
    "A token-mixing expert weighs the patches of a channel. Each square is the first-layer weight of one of its hidden "
    "units over the patch grid, those with the largest weights first; orange is positive, purple negative."
)
_FILTERS_MIXED = (
    " They are taken back to patches through the weight of the Re-represent layer before, as if it were linear."
)


def embed(data: object) -> Markup:
    """JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _image(samples: Samples, row: int, title: tuple[str, str]) -> dict[str, Any]:
    pixels = picture(samples.images[row], samples.mean, samples.std, side=None)
    small = max(pixels.shape[:2]) <= SMALL
    if not small:
        pixels = picture(samples.images[row], samples.mean, samples.std, side=_SIDE)
    return {"name": title[0], "answer": title[1], "uri": data_uri(pixels, photo=not small), "small": small,
            "index": int(samples.index[row]), "ratio": round(pixels.shape[1] / pixels.shape[0], 4)}  # fmt: skip


def _patch_layer(
    layer: PatchRouting, shown: int, words: Vocabulary | None, source: ImageSource | None
) -> dict[str, Any]:
    values = layer.shares if layer.scores is None else layer.scores
    low, high = (0.0, 1.0) if layer.exact else (float(values.min()), float(values.max()))
    found: dict[str, Any] = {
        "name": layer.layer,
        "experts": layer.num_experts,
        "grid": layer.grid,
        "exact": layer.exact,
        "colours": expert_colours(layer.num_experts),
        "low": low,
        "high": high,
        "full": full_scale(layer),
        "values": _bytes((values[:shown] - low) / max(high - low, 1e-12) * 255),
    }
    if layer.chosen is not None:
        found |= {"topK": layer.chosen.shape[-1], "chosen": _base64(layer.chosen[:shown].astype("<i2"))}
    if words is not None and source is not None:
        targets = np.unique(words.target).tolist()
        number = {target: place for place, target in enumerate(targets)}
        rows = zip(
            words.image.tolist(), words.target.tolist(), words.patch.tolist(), words.liking.tolist(), strict=True
        )
        found["words"] = {
            "sheet": data_uri(words.sheet, photo=True),
            "count": words.image.shape[1],
            "labels": [source.labels[target] for target in targets],
            "items": [
                [[i, number[t], p, round(v, 4)] for i, t, p, v in zip(*row, strict=True) if i >= 0] for row in rows
            ],
        }
    return found


def _channel_layer(layer: ChannelRouting) -> dict[str, Any]:
    assert layer.filters is not None
    experts, _, patches = layer.filters.shape
    filters = layer.filters[:, : max(1, _FILTERS // (experts * patches))]
    scale = np.abs(filters).max(axis=2, keepdims=True)
    levels = np.round(filters / np.where(scale > 0, scale, 1) * 127).astype(np.int8)
    return {
        "name": layer.layer,
        "experts": experts,
        "grid": layer.grid,
        "colours": expert_colours(experts),
        "load": [round(float(share), 4) for share in layer.load()],
        "count": filters.shape[1],
        "filters": _base64(levels),
    }


def _bytes(values: Floats) -> str:
    return _base64(np.clip(np.round(values), 0, 255).astype(np.uint8))


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def images_to_explore(total: int, macs: int | None) -> list[int]:
    """Indices, evenly spaced, of the images of a set that the vocabularies are taken from: all, or what time allows."""
    number = min(total, _MOST, max(200, int(_WORK // max(1, macs or 1))))
    return [int(i) for i in np.linspace(0, total - 1, number)] if total else []
