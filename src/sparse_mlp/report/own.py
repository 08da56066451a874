"""The page of a user's own pictures: what the experts of a run's model do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from sparse_mlp.errors import UserError
from sparse_mlp.report.experts import Examples, patches_section
from sparse_mlp.report.explore import MAX_PICTURES, explore_section
from sparse_mlp.report.page import Figures, Head, write_page
from sparse_mlp.report.routing import trace
from sparse_mlp.report.run import read_run
from sparse_mlp.report.samples import picture
from sparse_mlp.report.vocabulary import ImageSource


def write_routing_report(run_dir: Path | str, model: nn.Module, source: ImageSource, classes: Sequence[str]) -> Path:
    """Write `routing.html` into a run folder; returns its path.

    Shown are up to two dozen of the images, and the patches of all of them that each expert likes most. `classes`:
    names of the model's classes, none for a model without classifier. The targets of the images are their labels'
    numbers. UserError for a model without MoE layers, or where no image can be read.
    """
    run = read_run(run_dir)
    number = min(len(source.indices), MAX_PICTURES)
    samples = source.read([source.indices[int(i)] for i in np.linspace(0, len(source.indices) - 1, number)])
    if samples is None:
        raise UserError("none of the images can be read")
    traced = trace(model, samples.images)
    labels = [source.labels[target] for target in samples.targets.tolist()]
    pictures = [picture(image, samples.mean, samples.std) for image in samples.images]
    names = classes if traced.logits.ndim == 2 and traced.logits.shape[1] == len(classes) else []
    examples = Examples(samples, pictures, None, labels, names, traced)
    titles = [(label, examples.answer(i)) for i, label in enumerate(labels)]
    explored = explore_section(model, samples, titles, traced, source)
    if explored is None:
        raise UserError(f"the model of {run.path} has no MoE layers: there is no routing to show")
    sections = {"explore": explored, "patches": patches_section(examples, Figures(run.path / "figures"), "own_patches")}
    many = f"{source.total:,} images" if source.total > 1 else "one image"
    head = Head("Routing of your own images", run.name, f"{many}, seen by the model of this run")
    return write_page(
        run.path / "routing.html",
        "routing.html.j2",
        head,
        sections={anchor: section for anchor, section in sections.items() if section is not None},
        page_title=f"{head.kind} \N{MIDDLE DOT} {run.name}",
    )
