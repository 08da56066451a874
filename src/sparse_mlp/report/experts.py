"""The sections on the experts: their load over training, and where the patches and channels of test images went."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from torch import nn

from sparse_mlp.report import page
from sparse_mlp.report.analysis import balance
from sparse_mlp.report.curves import MANY_EXPERTS, importance_figure, load_figure, router_figure
from sparse_mlp.report.page import TITLES, Figures
from sparse_mlp.report.pictures import channels_figure, full_scale, overlays, patches_figure, patterns_figure
from sparse_mlp.report.routing import ChannelRouting, Traced, trace
from sparse_mlp.report.run import Ints, Routing, Run
from sparse_mlp.report.samples import Pixels, Samples, example_rows, picture
from sparse_mlp.report.style import expert_colours

_KINDS = {"mlp_tokens": "token mixing: routes channels", "mlp_channels": "channel mixing: routes tokens"}


def load_section(run: Run, figures: Figures) -> str:
    """Return the section on the load of every MoE layer, or nothing for a dense model."""
    if not run.routing:
        return ""
    lead = (
        "What the routers did while training, each point a single batch. Numbers in the text are means over the last "
        "tenth of the training; an expert under 5 % of its fair share counts as idle."
    )
    parts = [
        part
        for i, (name, routing) in enumerate(run.routing.items())
        for part in _layer_load(name, routing, figures, captions=i == 0)
    ]
    return page.section("load", TITLES["load"], lead, *parts)


def _layer_load(name: str, routing: Routing, figures: Figures, *, captions: bool) -> list[str]:
    kind = _KINDS.get(name.rpartition(".")[2], "")
    told = ", ".join(part for part in (kind, f"{routing.num_experts} experts") if part)
    dropped = float(np.nanmean(routing.dropped)) if np.isfinite(routing.dropped).any() else 0.0
    drops = "Nothing was dropped." if dropped == 0 else f"On average {100 * dropped:.2g} % was dropped."
    key = _file_name(name)
    shares = "Share of the assignments each expert got. Dotted: where the borders are in perfect balance."
    if routing.num_experts > MANY_EXPERTS:
        shares = "Each row is an expert; an even field is balance."
    drawn = [
        (load_figure(routing, "Load per expert"), f"load_{key}", shares),
        (
            importance_figure(routing),
            f"importance_{key}",
            "Bar: load. Dot: importance, the router's mean probability. Dashed: the fair share.",
        ),
        (
            router_figure(routing),
            f"router_{key}",
            "Entropy 1: the router cannot tell the experts apart; 0: it is sure of every item.",
        ),
    ]
    return [
        f'<h3>{escape(name)} <span class="aside">{escape(told)}</span></h3>',
        f'<p class="lead">{escape(balance(routing.final_load()).sentence())} {drops}</p>',
        page.row(figures.add(figure, name, caption if captions else "") for figure, name, caption in drawn),
    ]


@dataclass(frozen=True)
class Examples:
    """Test images with what the model did with them; `names` are those of all classes."""

    pictures: list[Pixels]
    targets: Ints
    names: Sequence[str]
    traced: Traced

    @property
    def labels(self) -> list[str]:
        """The true class of each image."""
        return [self.names[target] for target in self.targets]


def trace_examples(run: Run, model: nn.Module, samples: Samples, names: Sequence[str], seed: int) -> Examples:
    """Run the model on one image per class: those of `wanted_images`, or any without predictions."""
    targets, where = samples.targets.cpu().numpy(), samples.where()
    rows = example_rows(targets, seed)
    if run.predictions is not None:
        chosen = [int(run.predictions.index[row]) for row in example_rows(run.predictions.target, seed)]
        rows = [where[index] for index in chosen if index in where] or rows
    traced = trace(model, samples.images[rows])
    names = names or [str(c) for c in range(traced.logits.shape[1])]
    pictures = [picture(samples.images[row], samples.mean, samples.std) for row in rows]
    return Examples(pictures, targets[rows], names, traced)


def patches_section(examples: Examples, figures: Figures) -> str:
    """Return the section with the experts of the patches drawn over the images, or nothing without such layers."""
    traced = examples.traced
    if not traced.patches or traced.grid is None:
        return ""
    pictures = examples.pictures
    figures.save(patches_figure(traced.patches, pictures, examples.labels, traced.grid), "routing_patches")
    painted = {layer.layer: overlays(layer, pictures, traced.grid) for layer in traced.patches}
    cards = [_card(examples, i, {layer: drawn[i] for layer, drawn in painted.items()}) for i in range(len(pictures))]
    experts = max(layer.num_experts for layer in traced.patches)
    names = [f"expert {e}" for e in range(experts)]
    key = page.colour_key(expert_colours(experts), names) if experts <= MANY_EXPERTS else ""
    grid = f'<div class="samples" style="--n:{1 + len(painted)}">{"".join(cards)}</div>'
    return page.section("patches", TITLES["patches"], _patches_lead(traced), key, grid)


def _card(examples: Examples, i: int, painted: dict[str, Pixels]) -> str:
    """Return one image, the same painted by every layer, and whether the model recognised it."""
    logits, target = examples.traced.logits[i], int(examples.targets[i])
    winner, label = int(logits.argmax()), examples.names[target]
    probability = 1 / np.exp(logits - logits.max()).sum()
    drawn = [page.image(examples.pictures[i], f"test image of class {label}", "image")]
    drawn += [
        page.image(pixels, f"experts of the patches in {layer}", _block(layer)) for layer, pixels in painted.items()
    ]
    told = "recognised" if winner == target else f"taken for {examples.names[winner]}"
    head = f'{escape(label)} <span class="aside">{escape(told)}, p = {probability:.2f}</span>'
    kind = "right" if winner == target else "wrong"
    return f'<article class="sample"><h3 class="{kind}">{head}</h3><div>{"".join(drawn)}</div></article>'


def _patches_lead(traced: Traced) -> str:
    if all(layer.exact for layer in traced.patches):
        return (
            "The channel-mixing experts route the patches themselves. Colour: the expert with the largest gate in a "
            "patch; opacity: its share of the patch's gates. Experts of different layers have nothing in common but "
            "the colour."
        )
    tops = ", ".join(f"{_block(layer.layer)}: {100 * full_scale(layer):.1f}" for layer in traced.patches)
    return (
        "The channel-mixing experts do not route patches but re-represented tokens, each a learned mix of all patches, "
        "so no patch belongs to one expert. Drawn is an attribution: a patch counts for an expert by the gates of the "
        "tokens that went there, each times the size of the weight with which the token reads the patch. Colour: the "
        "expert whose share in the patch lies furthest above its mean over the image. Opacity: by how much; it is full "
        f"for the strongest tenth of a layer's patches ({tops} percentage points or more). Earlier layers have mixed "
        "the patches already, and experts of different layers have nothing in common but the colour."
    )


_STRIPES = (
    "Above: colour = expert, a row for each image. A stripe of one colour is a channel that goes to the same expert "
    "whatever the image. Below: the mean gate over these images, and each expert's share of the channels; dashed: the "
    "fair share."
)
_PATTERNS = (
    "Mean strength of an expert's channels over the patches (its shape only), relative to all channels. Orange: "
    "stronger there. Tokens are laid back on patches by the size of the Re-represent weights."
)


def channels_section(examples: Examples, figures: Figures) -> str:
    """Return the section on where the channels of the images went, or nothing without such layers."""
    traced = examples.traced
    if not traced.channels or traced.grid is None:
        return ""
    lead = (
        "The token-mixing experts route channels: each channel is a vector over the tokens, and different experts mix "
        "it differently across the image. Shown for the images above."
    )
    labels = examples.labels
    parts = [
        _layer_channels(routing, labels, traced.grid, figures, captions=i == 0)
        for i, routing in enumerate(traced.channels)
    ]
    return page.section("channels", TITLES["channels"], lead, *parts)


def _layer_channels(
    routing: ChannelRouting, labels: Sequence[str], grid: tuple[int, int], figures: Figures, *, captions: bool
) -> str:
    key = _file_name(routing.layer)
    changing = float((routing.gates.argmax(-1) != routing.gates.mean(0).argmax(-1)).mean())
    told = f"{routing.gates.shape[1]} channels, {routing.num_experts} experts"
    stripes = figures.add(
        channels_figure(routing, labels),
        f"channels_{key}",
        _STRIPES if captions else "",
        scroll="scroll far",
    )
    patterns = figures.add(
        patterns_figure(routing, grid),
        f"patterns_{key}",
        _PATTERNS if captions else "",
    )
    return (
        f'<h3>{escape(routing.layer)} <span class="aside">{escape(told)}</span></h3>'
        f'<p class="lead">The routing depends on the image: on average {100 * changing:.0f} % of its channels leave '
        f"the expert they favour over all these images.</p>{page.row([stripes, patterns], 'wide')}"
    )


def _block(layer: str) -> str:
    return re.sub(r"^blocks\.(\d+)\..*", r"block \1", layer)


def _file_name(layer: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", layer)
