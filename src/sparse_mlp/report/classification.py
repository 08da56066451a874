"""The report of a classification run: report.html, all in one file, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sparse_mlp.report.capacity import capacity_section
from sparse_mlp.report.experts import channels_section, load_section, measured_section, patches_section, trace_examples
from sparse_mlp.report.explore import explore_section
from sparse_mlp.report.header import accuracy_tile, balance_tile, cost_tiles, run_head
from sparse_mlp.report.page import Figures
from sparse_mlp.report.routing import measure_load
from sparse_mlp.report.run import read_run
from sparse_mlp.report.samples import Samples
from sparse_mlp.report.sections import class_names, classes_section, curves_section, save_page
from sparse_mlp.report.vocabulary import ImageSource


def write_classification_report(
    run_dir: Path | str,
    model: nn.Module | None = None,
    samples: Samples | None = None,
    source: ImageSource | None = None,
    *,
    classes: Sequence[str] | None = None,
    macs: int | None = None,
    seed: int = 0,
) -> Path:
    """Write `report.html` and `figures/` (PNG and SVG) into a run folder; returns the page's path.

    Args:
        run_dir: any run folder, finished or not.
        model: the trained model; with `samples` it is run on some of them to draw the routing.
        samples: test images, at least those of `wanted_images(run_dir, seed)`.
        source: test images from which the patches that each expert likes most are taken.
        classes: names in the order of the labels; default those of the folder's inputs.json, else the numbers.
        macs: multiply-adds of the model for one image.
        seed: which example images are shown.

    FileNotFoundError or UserError, one line, for a folder that is no run or whose files do not parse.
    """
    run = read_run(run_dir)
    names = class_names(run, classes)
    figures = Figures(run.path / "figures")
    sections: dict[str, object] = {
        "curves": curves_section(run, figures),
        "classes": classes_section(run, figures, names, samples),
        "load": load_section(run, figures),
        "capacity": capacity_section(run.path, figures),
    }
    balanced = balance_tile({name: routing.final_load() for name, routing in run.routing.items()})
    if model is not None and samples is not None and len(samples.images):
        if not run.routing:
            measured = measure_load(model, samples.images)
            sections["load"] = measured_section(measured, len(samples.images), figures)
            balanced = balance_tile({name: found.load for name, found in measured.items()}, ", on test images")
        examples = trace_examples(run, model, samples, names, seed)
        titles = [(label, examples.answer(i)) for i, label in enumerate(examples.labels)]
        sections["explore"] = explore_section(model, examples.samples, titles, examples.traced, source)
        sections["patches"] = patches_section(examples, figures)
        sections["channels"] = channels_section(examples, figures)
    head = run_head(run, [*accuracy_tile(run), *cost_tiles(run, macs), *balanced])
    return save_page(run, "classification.html.j2", head, sections)
