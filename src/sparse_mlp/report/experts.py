"""The sections on the experts: their load, and where the patches and channels of test images went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from sparse_mlp.report.analysis import balance
from sparse_mlp.report.loads import (
    MANY_EXPERTS,
    importance_figure,
    layers_figure,
    load_figure,
    loads_over_time_figure,
    router_figure,
)
from sparse_mlp.report.page import Drawing, Figures, Picture, Swatch, image
from sparse_mlp.report.pictures import channels_figure, full_scale, overlays, patches_figure, patterns_figure
from sparse_mlp.report.predictions import Floats, Ints
from sparse_mlp.report.routing import ChannelRouting, MeasuredLoad, Traced, trace
from sparse_mlp.report.run import Routing, RunData
from sparse_mlp.report.samples import MAX_EXAMPLES, SMALL, Pixels, Samples, example_rows, picture
from sparse_mlp.report.style import expert_colours

_KINDS = {"mlp_tokens": "token mixing: routes channels", "mlp_channels": "channel mixing: routes tokens"}
_FEW_LAYERS = 2  # of more layers all are drawn in one map


@dataclass(frozen=True)
class LayerLoad:
    """A layer with figures of its own."""

    name: str
    aside: str
    lead: str
    drawings: list[Drawing]


@dataclass(frozen=True)
class LoadSection:
    """Load of the experts: a table and maps of all layers, or each of few layers by itself.

    A row of the table is layer, part, experts, busiest, quietest, idle, dropped and, where it was measured, entropy.
    """

    lead: str
    table: list[list[str]] = field(default_factory=list)
    maps: list[Drawing] = field(default_factory=list)
    layers: list[LayerLoad] = field(default_factory=list)


def load_section(run: RunData, figures: Figures) -> LoadSection | None:
    """Return the load of every MoE layer over the training; None where none was measured."""
    layers = run.routing
    if not layers:
        return None
    lead = (
        "What the routers did while training, each point a single batch. Numbers in the text are means over the last "
        "tenth of the training; an expert under 5 % of its fair share counts as idle."
    )
    if len(layers) <= _FEW_LAYERS:
        blocks = [
            _layer_load(name, routing, figures, captions=i == 0) for i, (name, routing) in enumerate(layers.items())
        ]
        return LoadSection(lead, layers=blocks)
    loads = {name: routing.final_load() for name, routing in layers.items()}
    table = [
        [*_table_row(name, loads[name]), _share(_mean(routing.dropped)), _number(_mean(routing.entropy[-10:]))]
        for name, routing in layers.items()
    ]
    maps = [
        figures.add(layers_figure(loads), "load_layers", "White: the fair share. A row is a layer.", scroll="scroll"),
        figures.add(
            loads_over_time_figure(layers),
            "load_over_time",
            "A band is a layer, a row in it an expert. A white field is balance; a stripe is an expert that stays "
            "busier or idler than the others.",
            scroll="scroll",
        ),
    ]
    return LoadSection(lead, table, maps)


def measured_section(loads: Mapping[str, MeasuredLoad], images: int, figures: Figures) -> LoadSection | None:
    """Return the load of every MoE layer on test images, for a run whose training measured none."""
    if not loads:
        return None
    lead = (
        f"The layers with experts did not train, so nothing was measured in training. This is what their routers do "
        f"with {images:,} of the test images; an expert under 5 % of its fair share counts as idle."
    )
    table = [[*_table_row(name, measured.load), _share(measured.dropped)] for name, measured in loads.items()]
    shown = {name: measured.load for name, measured in loads.items()}
    drawn = figures.add(
        layers_figure(shown, "on test images"),
        "load_layers",
        "White: the fair share. A row is a layer.",
        scroll="scroll",
    )
    return LoadSection(lead, table, [drawn])


def _table_row(name: str, load: Floats) -> list[str]:
    stats = balance(load)
    idle = ", ".join(map(str, stats.dead)) or "none"
    kind = _KINDS.get(name.rpartition(".")[2], "").partition(":")[0]
    return [name, kind, str(len(load)), f"{stats.busiest:.2f}", f"{stats.quietest:.2f}", idle]


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2g} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _layer_load(name: str, routing: Routing, figures: Figures, *, captions: bool) -> LayerLoad:
    kind = _KINDS.get(name.rpartition(".")[2], "")
    aside = ", ".join(part for part in (kind, f"{routing.num_experts} experts") if part)
    dropped = _mean(routing.dropped)
    drops = "" if dropped is None else f" On average {100 * dropped:.2g} % was dropped."
    drops = " Nothing was dropped." if dropped == 0 else drops
    key = _file_name(name)
    shares = "Share of the assignments each expert got. Dotted: where the borders are in perfect balance."
    if routing.num_experts > MANY_EXPERTS:
        shares = "Each row is an expert; an even field is balance."
    importance = "Bar: load. Dot: importance, the router's mean probability. Dashed: the fair share."
    entropy = "Entropy 1: the router cannot tell the experts apart; 0: it is sure of every item."
    drawn = [
        (load_figure(routing, "Load per expert"), f"load_{key}", shares),
        (importance_figure(routing), f"importance_{key}", importance),
        (router_figure(routing), f"router_{key}", entropy),
    ]
    return LayerLoad(
        name,
        aside,
        f"{balance(routing.final_load()).sentence()}{drops}",
        [figures.add(figure, name, caption if captions else "") for figure, name, caption in drawn],
    )


@dataclass(frozen=True)
class Examples:
    """Images with what the model did with them; `names` are those of its classes, none if it has no classifier.

    labels: what each image is called, its true class where `targets` are known.
    """

    samples: Samples
    pictures: list[Pixels]
    targets: Ints | None
    labels: Sequence[str]
    names: Sequence[str]
    traced: Traced

    def right(self, i: int) -> bool:
        """Whether the model recognised an image; True where its class is not known."""
        return self.targets is None or int(self.traced.logits[i].argmax()) == self.targets[i]

    def answer(self, i: int) -> str:
        """What the model takes an image for, and how surely."""
        if not self.names:
            return ""
        logits = self.traced.logits[i]
        known = self.targets is not None and self.right(i)
        found = "recognised" if known else f"taken for {self.names[logits.argmax()]}"
        return f"{found}, p = {1 / np.exp(logits - logits.max()).sum():.2f}"


def trace_examples(run: RunData, model: nn.Module, samples: Samples, names: Sequence[str], seed: int) -> Examples:
    """Run the model on one image per class: those of `wanted_images`, or any without predictions."""
    targets, where = samples.targets.cpu().numpy(), samples.where()
    rows = example_rows(targets, seed)
    if run.predictions is not None:
        chosen = [int(run.predictions.index[row]) for row in example_rows(run.predictions.target, seed)]
        rows = [where[index] for index in chosen if index in where] or rows
    chosen_samples = replace(
        samples, images=samples.images[rows], targets=samples.targets[rows], index=samples.index[rows]
    )
    traced = trace(model, chosen_samples.images)
    names = names or [str(c) for c in range(traced.logits.shape[1])]
    pictures = [picture(image, samples.mean, samples.std) for image in chosen_samples.images]
    labels = [names[target] for target in targets[rows]]
    return Examples(chosen_samples, pictures, targets[rows], labels, names, traced)


@dataclass(frozen=True)
class Card:
    """One test image with what is shown of it; `right` colours the heading."""

    title: str
    aside: str
    right: bool
    pictures: list[Picture]


@dataclass(frozen=True)
class PatchesSection:
    """The experts of the patches drawn over the images."""

    lead: str
    key: list[Swatch]
    cards: list[Card]


def patches_section(examples: Examples, figures: Figures, figure: str = "routing_patches") -> PatchesSection | None:
    """Return where the patches of the images went; None without layers that route patches. `figure` names its file."""
    traced = examples.traced
    if not traced.patches:
        return None
    pictures = examples.pictures[:MAX_EXAMPLES]
    figures.save(patches_figure(traced.patches, pictures, examples.labels[:MAX_EXAMPLES]), figure)
    painted = {layer.layer: overlays(layer, pictures) for layer in traced.patches}
    cards = [_card(examples, i, {layer: drawn[i] for layer, drawn in painted.items()}) for i in range(len(pictures))]
    experts = max(layer.num_experts for layer in traced.patches)
    named = [Swatch(colour, f"expert {e}") for e, colour in enumerate(expert_colours(experts))]
    return PatchesSection(_patches_lead(traced), named if experts <= MANY_EXPERTS else [], cards)


def _card(examples: Examples, i: int, painted: dict[str, Pixels]) -> Card:
    """Return one image, the same painted by every layer, and whether the model recognised it."""
    label, photo = examples.labels[i], max(examples.samples.images.shape[-2:]) > SMALL
    drawn = [image(examples.pictures[i], f"image: {label}", "image", photo=photo)]
    drawn += [
        image(pixels, f"experts of the patches in {layer}", _block(layer), photo=photo)
        for layer, pixels in painted.items()
    ]
    return Card(label, examples.answer(i), examples.right(i), drawn)


def _patches_lead(traced: Traced) -> str:
    if all(layer.exact for layer in traced.patches):
        return (
            "The channel-mixing experts route the patches themselves. Colour: the expert with the largest gate in a "
            "patch; area of the square: its share of the patch's gates. Experts of different layers have nothing in "
            "common but the colour."
        )
    tops = ", ".join(f"{_block(layer.layer)}: {100 * full_scale(layer):.1f}" for layer in traced.patches)
    return (
        "The channel-mixing experts do not route patches but re-represented tokens, each a learned mix of all patches, "
        "so no patch belongs to one expert. Drawn is an attribution: a patch counts for an expert by the gates of the "
        "tokens that went there, each times the size of the weight with which the token reads the patch. Colour: the "
        "expert whose share in the patch lies furthest above its mean over the image. Area of the square: by how much; "
        f"it is largest for the strongest tenth of a layer's patches ({tops} percentage points or more). Earlier "
        "layers have mixed the patches already, and experts of different layers have nothing in common but the colour."
    )


_SHARES = (
    "A row is an expert, a column a channel; the darker a cell, the more of the images send the channel there. A "
    "column with one dark cell is a channel that goes to the same expert whatever the image."
)
_PATTERNS = (
    "Mean strength of an expert's channels over the patches (its shape only), relative to all channels. Orange: "
    "stronger there. Tokens are laid back on patches by the size of the Re-represent weights."
)


def channels_section(examples: Examples, figures: Figures) -> LoadSection | None:
    """Return where the channels of the images went; None without layers that route channels."""
    traced = examples.traced
    if not traced.channels:
        return None
    lead = (
        "The token-mixing experts route channels: each channel is a vector over the tokens, and different experts mix "
        "it differently across the image. Shown for the images above."
    )
    layers = [_layer_channels(layer, figures, captions=i == 0) for i, layer in enumerate(traced.channels)]
    return LoadSection(lead, layers=layers)


def _layer_channels(routing: ChannelRouting, figures: Figures, *, captions: bool) -> LayerLoad:
    key = _file_name(routing.layer)
    changing = float((routing.gates.argmax(-1) != routing.gates.mean(0).argmax(-1)).mean())
    shares, patterns = (_SHARES, _PATTERNS) if captions else ("", "")
    return LayerLoad(
        routing.layer,
        f"{routing.gates.shape[1]} channels, {routing.num_experts} experts",
        f"The routing depends on the image: on average {100 * changing:.0f} % of its channels leave the expert they "
        "favour over all these images.",
        [
            figures.add(channels_figure(routing), f"channels_{key}", shares, scroll="scroll far"),
            figures.add(patterns_figure(routing), f"patterns_{key}", patterns),
        ],
    )


def _block(layer: str) -> str:
    return re.sub(r"^blocks\.(\d+)\..*", r"block \1", layer)


def _file_name(layer: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", layer)
