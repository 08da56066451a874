"""The report of one run: report.html, all in one file, and its figures as PNGs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from sparse_mlp.errors import UserError
from sparse_mlp.report import page
from sparse_mlp.report.analysis import balance, calibration, class_accuracy, confusion_matrix
from sparse_mlp.report.classes import (
    MANY_CLASSES,
    WORST_MATRIX,
    calibration_figure,
    class_accuracy_figure,
    class_profile_figure,
    confusion_figure,
)
from sparse_mlp.report.curves import curve_figures
from sparse_mlp.report.experts import channels_section, load_section, patches_section, trace_examples
from sparse_mlp.report.page import TITLES, Figures
from sparse_mlp.report.run import Predictions, Run, read_run
from sparse_mlp.report.samples import Samples, mistake_rows, picture


def write_report(
    run_dir: Path | str,
    model: nn.Module | None = None,
    samples: Samples | None = None,
    *,
    classes: Sequence[str] | None = None,
    macs: int | None = None,
    seed: int = 0,
) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder; returns the page's path.

    Args:
        run_dir: any run folder, finished or not.
        model: the trained model; with `samples` it is run on some of them to draw the routing.
        samples: test images, at least those of `wanted_images(run_dir, seed)`.
        classes: names in the order of the labels; default those of the folder's inputs.json, else the numbers.
        macs: multiply-adds of the model for one image.
        seed: which example images are shown.

    FileNotFoundError or ValueError, one line, for a folder that is no run or whose files do not parse.
    """
    run = read_run(run_dir)
    names = class_names(run, classes)
    figures = Figures(run.path / "figures")
    parts = [
        ("curves", curves_section(run, figures)),
        ("classes", classes_section(run, figures, names, samples)),
        ("load", load_section(run, figures)),
    ]
    if model is not None and samples is not None and len(samples.images):
        examples = trace_examples(run, model, samples, names, seed)
        parts += [("patches", patches_section(examples, figures)), ("channels", channels_section(examples, figures))]
    present = [(anchor, html) for anchor, html in parts if html]
    body = "\n".join([header(run, macs, [anchor for anchor, _ in present]), *(html for _, html in present)])
    return save_page(run, body)


def save_page(run: Run, body: str) -> Path:
    """Write the page of a run with its settings below; returns its path."""
    target = run.path / "report.html"
    temporary = run.path / ".report.html.tmp"
    temporary.write_text(page.document(f"{run.model_name} · {run.name}", f"{body}\n{footer(run)}"), encoding="utf-8")
    temporary.replace(target)
    return target


def class_names(run: Run, classes: Sequence[str] | None) -> list[str]:
    """Return the names of the classes: those given, else those the run folder knows, else their numbers."""
    number = run.predictions.num_classes if run.predictions is not None else None
    names = list(classes) if classes is not None else run.classes
    if names is None:
        return [str(c) for c in range(number or 0)]
    if number is not None and len(names) != number:
        raise UserError(f"{run.path} has predictions of {number} classes, but {len(names)} class names are given")
    return [str(name) for name in names]


# The top


def header(run: Run, macs: int | None, anchors: Sequence[str]) -> str:
    links = "".join(f'<a href="#{anchor}">{TITLES[anchor]}</a>' for anchor in anchors)
    recipe = run.config.get("name") or run.config.get("recipe")
    told = " · ".join(str(part) for part in (recipe, run.name if run.name != recipe else None, _status(run)) if part)
    return f"""<header>
<p class="eyebrow">Run report</p>
<h1>{escape(run.model_name)}</h1>
<p class="eyebrow">{escape(told)}</p>
<nav>{links}</nav>
{page.headline(_headline(run, macs))}
{page.notes(run.notes)}
{page.facts(_facts(run), code=("Command", "Commit"))}
</header>"""


def _status(run: Run) -> str:
    whats = [event.get("what") for event in run.events]
    resumed = whats.count("resumed")
    told = "finished" if "finished" in whats else "stopped" if whats[-1:] == ["stopped"] else "not finished"
    again = {0: "", 1: ", resumed once"}.get(resumed, f", resumed {resumed} times")
    return f"{told} at step {run.last_step:,}{again}"


def _headline(run: Run, macs: int | None) -> list[tuple[str, str, str]]:
    top1, rate = run.top1, run.images_per_s
    numbers = []
    if top1 is not None:
        images = f"of {len(run.predictions.target):,} test images" if run.predictions is not None else "last evaluation"
        numbers.append(("kNN top-1 accuracy" if run.pretraining else "Top-1 accuracy", f"{100 * top1:.2f} %", images))
    if run.parameters is not None:
        numbers.append(("Parameters", page.count(run.parameters), ""))
    if macs is not None:
        numbers.append(("Multiply-adds", page.count(macs), "per image, forward"))
    if rate is not None:
        numbers.append(("Training speed", f"{rate:,.0f}", "images/s, median"))
    numbers.append(("Training time", page.duration(run.seconds), "without evaluations"))
    if run.routing:
        found = [balance(layer.final_load()) for layer in run.routing.values()]
        dead = sum(len(layer.dead) for layer in found)
        idle = "no idle expert" if not dead else f"{dead} idle expert{'s' if dead > 1 else ''}"
        numbers.append(
            ("Busiest expert", f"{max(layer.busiest for layer in found):.2f} {page.TIMES}", f"its fair share; {idle}")
        )
    return numbers


def _facts(run: Run) -> dict[str, str]:
    environment = run.environment
    entries = {"Command": _command(environment.get("command"))}
    commit = environment.get("git_commit")
    if commit:
        entries["Commit"] = str(commit)[:12] + (" with local changes" if environment.get("git_changed") else "")
    entries["Date"] = str(environment.get("date", "")).replace("T", " ").replace("+00:00", " UTC")
    entries["Hardware"] = _hardware(environment.get("hardware"))
    versions = environment.get("versions")
    if isinstance(versions, dict):
        entries["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {term: value for term, value in entries.items() if value}


def _command(words: Any) -> str:
    """Return the command line as one would type it."""
    if not isinstance(words, list) or not words:
        return str(words or "")
    program = Path(str(words[0]))
    start = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return f"{start} {shlex.join(map(str, words[1:]))}".strip()


def _hardware(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found or "")
    parts = [str(found.get("cpu") or found.get("machine") or "")]
    counts = {name: found.get(f"{name}s") for name in ("core", "thread")}
    parts += [f"{count} {name}" + ("s" if count != 1 else "") for name, count in counts.items() if count]
    if found.get("memory_gib"):
        parts.append(f"{found['memory_gib']:g} GiB")
    return ", ".join(part for part in [*parts, *map(str, found.get("gpus") or [])] if part)


def footer(run: Run) -> str:
    return f"""{page.config_table(run.config)}
<footer><p>Drawn by sparse-mlp from the files of this run folder. The figures are in figures/ as PNG.</p></footer>"""


# Training


_CURVES = {
    "loss": "What was optimised on the training images, and the plain loss on the test images. Augmentation, mixing "
    "and label smoothing can keep the training loss above the test loss.",
    "accuracy": "Share of right answers on augmented training images, and on all test images.",
    "learning_rate": "Warm-up, then the schedule.",
    "gradient_norm": "Before clipping. Spikes that the loss follows are a sign of too high a learning rate.",
    "throughput": "Training images per second, the loading of data included.",
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


def curves_section(run: Run, figures: Figures) -> str:
    captions = _CURVES | (_PRETRAINING_CURVES if run.pretraining else {})
    drawn = [figures.add(figure, name, captions[name]) for name, figure in curve_figures(run).items()]
    if not drawn:
        return ""
    lead = (
        "Each panel runs over steps; the scale on its upper edge is the training time. Where lines are many, the pale "
        "one is what was logged and the strong one its moving average."
    )
    return page.section("curves", TITLES["curves"], lead, page.row(drawn))


# Classes


def classes_section(run: Run, figures: Figures, names: Sequence[str], samples: Samples | None) -> str:
    predictions = run.predictions
    if predictions is None or not len(predictions.target):
        return ""
    confusion, mean = confusion_matrix(predictions), float(predictions.correct.mean())
    accuracy = class_accuracy(confusion)
    wrong = int((~predictions.correct).sum())
    lead = f"{wrong:,} of {len(predictions.target):,} test images are taken for something else."
    if predictions.num_classes > 5:
        lead += f" The right class is among the first five for {100 * predictions.in_top5.mean():.2f} %."
    many = len(accuracy.order) > MANY_CLASSES
    wide = "scroll" if len(accuracy.order) > 12 else ""
    bars = figures.add(
        class_accuracy_figure(accuracy, names, mean),
        "class_accuracy",
        "Dot: accuracy of a class. Band: its 95 % interval, wide where images are few. Orange: the mean.",
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
        "how sure it may be; below it is overconfident. Grey: share of the images.",
    )
    if many:
        text = "Accuracy of every class, sorted. Orange: the mean."
        profile = figures.add(class_profile_figure(accuracy, mean), "class_profile", text)
        panels = page.row([bars, matrix, profile, sure], "two")
    else:
        panels = page.row([f'<div class="stack">{bars}{sure}</div>', matrix], "two")
    return page.section("classes", TITLES["classes"], lead, panels, _mistakes(predictions, names, samples))


def _mistakes(predictions: Predictions, names: Sequence[str], samples: Samples | None) -> str:
    where = samples.where() if samples is not None else {}
    blocks = []
    for pair, rows in mistake_rows(predictions):
        pictures = []
        for r in rows:
            index, probability = int(predictions.index[r]), predictions.probability[r]
            if samples is not None and index in where:
                alt = f"test image {index}: {names[pair.true]} taken for {names[pair.predicted]}"
                pixels = picture(samples.images[where[index]], samples.mean, samples.std)
                pictures.append(page.image(pixels, alt, f"p = {probability:.2f} · #{index}"))
        times = f"{pair.count} of {pair.images} images"
        title = f'{escape(names[pair.true])} → {escape(names[pair.predicted])} <span class="aside">{times}</span>'
        blocks.append(f'<section><h3>{title}</h3><div class="thumbs">{"".join(pictures)}</div></section>')
    if not blocks:
        return ""
    told = "true class → answer, the surest images first; # counts in the test set"
    head = f'<h3>The most frequent mistakes <span class="aside">{told}</span></h3>'
    return f'{head}\n<div class="pairs">{"".join(blocks)}</div>'
