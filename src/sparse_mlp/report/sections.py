"""What the pages of several kinds of run share: sections on training and on classes, and writing the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparse_mlp.errors import UserError
from sparse_mlp.report.analysis import calibration, class_accuracy, confusion_matrix
from sparse_mlp.report.classes import (
    MANY_CLASSES,
    WORST_MATRIX,
    calibration_figure,
    class_accuracy_figure,
    class_profile_figure,
    confusion_figure,
)
from sparse_mlp.report.curves import curve_figures
from sparse_mlp.report.page import Drawing, Figures, Head, Picture, Swatch, image, settings, write_page
from sparse_mlp.report.predictions import Predictions
from sparse_mlp.report.run import RunData
from sparse_mlp.report.samples import Samples, mistake_rows, picture

_MAX_MISTAKES = 200  # misclassified images that the page lists


def save_page(run: RunData, template: str, head: Head, sections: Mapping[str, object]) -> Path:
    """Write the page of a run with its settings below; sections that are None are left out. Returns its path."""
    return write_page(
        run.path / "report.html",
        template,
        head,
        sections={anchor: section for anchor, section in sections.items() if section is not None},
        settings=settings(run.config),
        page_title=f"{head.title} · {run.name}",
    )


def class_names(run: RunData, classes: Sequence[str] | None = None) -> list[str]:
    """Return the names of the classes: those given, else those the run folder knows, else their numbers."""
    number = run.predictions.num_classes if run.predictions is not None else None
    names = list(classes) if classes is not None else run.classes
    if names is None:
        return [str(c) for c in range(number or 0)]
    if number is not None and len(names) != number:
        raise UserError(f"{run.path} has predictions of {number} classes, but {len(names)} class names are given")
    return [str(name) for name in names]


_CURVES = {
    "loss": "What was optimised on the training images, and the plain loss on the test images. Augmentation, mixing "
    "and label smoothing can keep the training loss above the test loss.",
    "accuracy": "Share of right answers on augmented training images, and on all test images.",
    "pixel_accuracy": "Share of right pixels: in augmented crops of training images, and in whole test images.",
    "miou": "Mean over the classes of intersection over union, on all test images.",
    "box_map50": "Average precision, mean over the classes; a box is right that overlaps the object's by half.",
    "box_map": "Average precision, mean over the classes and over ten demands on the overlap, from 0.5 to 0.95.",
    "mask_map": "The same of the masks.",
    "learning_rate": "Warm-up, then the schedule.",
    "gradient_norm": "Before clipping. Spikes that the loss follows are a sign of too high a learning rate.",
    "throughput": "In training, the loading of data included.",
    "balance_loss": "Squared variation of the experts' importance and load; 0 is perfect balance.",
}
_PRETRAINING_CURVES = {
    "loss": "Both views' contrast, times twice the temperature. Comparable between runs of one batch size only.",
    "first_gradient_norm": "Of the first trainable weight matrix: instability in pre-training shows here first.",
    "momentum": "Share of itself that the key encoder keeps in an update.",
    "contrast": "How often the key nearest to a view is the other view of the same image, among those of the batch.",
    "knn": "Weighted kNN on the features, training images with their labels against all test images.",
    "feature_std": "Standard deviation of the l2-normalised features, times the square root of their number: towards 0 "
    "the features of all images become one.",
    "feature_rank": "Effective rank (RankMe) of the test features: few directions are a collapse as well.",
}


@dataclass(frozen=True)
class CurvesSection:
    """Figures over the training."""

    lead: str
    drawings: list[Drawing]


def curves_section(run: RunData, figures: Figures, other: Mapping[str, str] | None = None) -> CurvesSection | None:
    """Return the curves of a run, some with `other` captions; None where nothing was logged."""
    captions = {**_CURVES, **(_PRETRAINING_CURVES if run.pretraining else {}), **(other or {})}
    drawn = [figures.add(figure, name, captions[name]) for name, figure in curve_figures(run).items()]
    lead = (
        "Each panel runs over steps; the scale on its upper edge is the training time. Where lines are many, the pale "
        "one is what was logged and the strong one its moving average."
    )
    return CurvesSection(lead, drawn) if drawn else None


@dataclass(frozen=True)
class Confusion:
    """One kind of mistake with sample images."""

    true: str
    predicted: str
    aside: str
    pictures: list[Picture]


@dataclass(frozen=True)
class ClassesSection:
    """What is right and wrong. `misses` are (name, true class, answer, probability), the surest first."""

    lead: str
    bars: Drawing
    matrix: Drawing
    calibration: Drawing
    profile: Drawing | None
    confusions: list[Confusion]
    misses: list[tuple[str, str, str, str]]
    missed: int
    csv: bool
    items: str = "images"
    extra: list[Drawing] = field(default_factory=list)


def classes_section(
    run: RunData, figures: Figures, names: Sequence[str], samples: Samples | None = None, extra: Sequence[Drawing] = ()
) -> ClassesSection | None:
    """Return what is right and wrong; None without predictions. `extra` figures come first."""
    predictions = run.predictions
    if predictions is None or not len(predictions.target):
        return None
    confusion, mean = confusion_matrix(predictions), float(predictions.correct.mean())
    accuracy = class_accuracy(confusion)
    wrong = int((~predictions.correct).sum())
    lead = f"{wrong:,} of {len(predictions.target):,} test {run.items} are taken for something else."
    if predictions.top5 is not None and predictions.num_classes > 5:
        lead += f" The right class is among the first five for {100 * predictions.top5:.2f} %."
    many = len(accuracy.order) > MANY_CLASSES
    wide = "scroll" if len(accuracy.order) > 12 else "plain"
    bars = figures.add(
        class_accuracy_figure(accuracy, names, mean),
        "class_accuracy",
        f"Dot: accuracy of a class. Band: its 95 % interval, wide where {run.items} are few. Orange: the mean.",
        scroll=wide,
    )
    matrix = figures.add(
        confusion_figure(confusion, names),
        "confusion_matrix",
        "Rows are the true classes, columns the answers. Blue: right. Orange: mistakes, the stronger the larger "
        "their share of the row; the worst has full colour."
        + (f" Only the {WORST_MATRIX} classes in the most frequent mistakes." if many else ""),
        scroll=wide,
    )
    sure = figures.add(
        calibration_figure(calibration(predictions)),
        "calibration",
        "Line: how often the answer is right, by the probability the model gives it. On the diagonal the model knows "
        f"how sure it may be; below it is overconfident. Grey: share of the {run.items}.",
    )
    text = "Accuracy of every class, sorted. Orange: the mean."
    profile = figures.add(class_profile_figure(accuracy, mean), "class_profile", text) if many else None
    return ClassesSection(
        lead,
        bars,
        matrix,
        sure,
        profile,
        confusions=_confusions(predictions, names, samples, run.items),
        misses=_misses(predictions, names),
        missed=wrong,
        csv=(run.path / "predictions.csv").is_file(),
        items=run.items,
        extra=list(extra),
    )


def _misses(predictions: Predictions, names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    rows = np.flatnonzero(~predictions.correct)
    rows = rows[np.argsort(-predictions.probability[rows], kind="stable")][:_MAX_MISTAKES]
    found = [
        (
            predictions.name(int(row)),
            names[predictions.target[row]],
            names[predictions.predicted[row]],
            f"{predictions.probability[row]:.2f}",
        )
        for row in rows
    ]
    return found if any(name for name, *_ in found) else []


def _confusions(predictions: Predictions, names: Sequence[str], samples: Samples | None, items: str) -> list[Confusion]:
    where = samples.where() if samples is not None else {}
    blocks = []
    for pair, rows in mistake_rows(predictions):
        pictures = []
        for r in rows:
            index, probability = int(predictions.index[r]), predictions.probability[r]
            if samples is not None and index in where:
                name = predictions.name(r)
                alt = f"test image {name}: {names[pair.true]} taken for {names[pair.predicted]}"
                pixels = picture(samples.images[where[index]], samples.mean, samples.std)
                pictures.append(image(pixels, alt, f"p = {probability:.2f} · {name}"))
        aside = f"{pair.count} of {pair.images} {items}"
        blocks.append(Confusion(names[pair.true], names[pair.predicted], aside, pictures))
    return blocks


@dataclass(frozen=True)
class PictureRow:
    """Pictures of one image side by side."""

    title: str
    pictures: list[Picture]


@dataclass(frozen=True)
class ExamplesSection:
    """The images with the best and with the worst answers, and what their colours stand for."""

    lead: str
    best: list[PictureRow]
    worst: list[PictureRow]
    key: list[Swatch] = field(default_factory=list)
