"""Tables and the figure of the upcycling study, from the runs that are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from experiments.runs import NamedRun, is_finished
from experiments.upcycling.arms import (
    ARMS,
    BATCH_SIZE,
    CONTINUED,
    DENSE,
    SCRATCH,
    SEEDS,
    SUBJECTS,
    UPCYCLED,
    VARIANTS,
    multiply_adds,
    planned_runs,
)
from sparse_mlp.engine.run import environment
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import Run
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.moe import MoeMlp
from sparse_mlp.report import read_run
from sparse_mlp.report.style import save_png

MARGIN = 0.5
"""Points that `upcycled` must be ahead by, beyond the spread."""

_TERA = 1e12
_WINDOW = 5  # lines of metrics that a point of a curve is the mean of

Results = Mapping[str, dict[str, Any]]
"""What `measure` gives, by the run's name: subject/arm/seed0."""


def write_results(out: Path, target: Path) -> list[Path]:
    """The measurements, the tables and the figure of the finished runs. UserError if there are none."""
    results = {planned.name: measure(planned, out) for planned in planned_runs() if is_finished(out / planned.name)}
    if not results:
        raise UserError(f"there is no finished run of the upcycling study in {out}")
    (target / "results").mkdir(parents=True, exist_ok=True)
    data, tables, figure = target / "results" / "cifar10.json", target / "results" / "cifar10.md", target / "seam.png"
    machine = {name: value for name, value in environment().items() if name != "command"}  # it has paths
    data.write_text(json.dumps({"environment": machine, "runs": results}) + "\n", encoding="utf-8")
    written = "<!-- Written by `python -m experiments.upcycling report` -->\n"
    tables.write_text(
        "\n".join([written, main_table(results), cost_table(results), expert_table(results), variant_table(results)]),
        encoding="utf-8",
    )
    save_png(seam_figure(results), figure, dpi=90)
    return [data, tables, figure]


def measure(planned: NamedRun[ClassifyRecipe], out: Path) -> dict[str, Any]:
    """Accuracy, costs and training loss of a finished run."""
    run, data = Run(out / planned.name), read_run(out / planned.name)
    macs = multiply_adds(planned.recipe.model)
    step, loss = data.train.step, data.train.get("loss")
    whole = len(step) // _WINDOW * _WINDOW
    return {
        "top1": run.metrics["top1"],
        "test_loss": run.metrics["loss"],
        "parameters": data.parameters,
        "macs": macs,
        "steps": data.last_step,
        "training_macs": training_macs(macs, data.last_step),
        "experts_apart": experts_apart(run.load()),
        "router_entropy": [round(float(layer.entropy[-1]), 3) for layer in data.routing.values()],
        "curve": {
            "step": step[:whole].reshape(-1, _WINDOW)[:, -1].astype(int).tolist(),
            "loss": loss[:whole].reshape(-1, _WINDOW).mean(1).round(4).tolist(),
        },
    }


def experts_apart(model: nn.Module) -> list[float]:
    """Of each layer of experts how far they are from their mean, as a share of the mean's norm; 0 for copies."""
    weights = [
        weight.detach().flatten(1)
        for layer in model.modules()
        if isinstance(layer, MoeMlp)
        for weight in (layer.experts.fc1.weight, layer.experts.fc2.weight)
    ]
    means = [weight.mean(0) for weight in weights]
    return [
        round(float((weight - mean).norm(dim=1).mean() / mean.norm()), 3)
        for weight, mean in zip(weights, means, strict=True)
    ]


def training_macs(macs: int, steps: Any) -> Any:
    """Multiply-adds of so many training steps; a backward pass counts as two forward passes."""
    return 3 * macs * BATCH_SIZE * steps


def by_seed(results: Results, subject: str, arm: str, key: str = "top1") -> dict[int, Any]:
    """A figure of each finished run of an arm, by seed."""
    names = {seed: f"{subject}/{arm.replace(' ', '_')}/seed{seed}" for seed in SEEDS}
    return {seed: results[name][key] for seed, name in names.items() if name in results}


def differences(results: Results, subject: str, arm: str, other: str) -> list[float]:
    """Points of accuracy that an arm is ahead of another, for each seed that both have."""
    own, others = by_seed(results, subject, arm), by_seed(results, subject, other)
    return [100 * (own[seed] - others[seed]) for seed in own if seed in others]


def verdict(ahead: Sequence[float]) -> str:
    """Whether `upcycled` is ahead of `continued` by the margin more than the spread."""
    if len(ahead) < 2:
        return "not decided"
    return "yes" if mean(ahead) > MARGIN + stdev(ahead) else "no"


def spread(values: Sequence[float], sign: str = "") -> str:
    """`62.10 ± 0.35`, of one value without a deviation, of none nothing."""
    if not values:
        return ""
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main_table(results: Results) -> str:
    """Top-1 of the four arms, mean and standard deviation over the seeds, and whether upcycling pays."""
    head = ["", *(f"`{arm}`" for arm in ARMS), "`upcycled` - `continued`", "`upcycled` - `scratch`", "seeds", "pays"]
    rows = [head, ["---"] * len(head)]
    for subject in SUBJECTS:
        found = [[100 * top1 for top1 in by_seed(results, subject, arm).values()] for arm in ARMS]
        ahead = differences(results, subject, UPCYCLED, CONTINUED)
        rows.append(
            [
                subject,
                *(spread(top1) for top1 in found),
                spread(ahead, "+"),
                spread(differences(results, subject, UPCYCLED, SCRATCH), "+"),
                f"{len(ahead)} of {len(SEEDS)}",
                verdict(ahead),
            ]
        )
    return _markdown(rows)


def cost_table(results: Results) -> str:
    """What a run of each arm costs."""
    head = ["", "arm", "parameters", "multiply-adds an image", "steps", "multiply-adds of training"]
    rows = [head, ["---"] * len(head)]
    for subject in SUBJECTS:
        for arm in ARMS:
            seeds = by_seed(results, subject, arm)
            if not seeds:
                continue
            one = results[f"{subject}/{arm}/seed{min(seeds)}"]
            macs, spent = f"{one['macs'] / 1e6:.2f} M", f"{one['training_macs'] / _TERA:.2f} T"
            cells = [f"{one['parameters'] / 1e3:.0f} k", macs, f"{one['steps']:,}", spent]
            rows.append([subject, f"`{arm}`", *cells])
    return _markdown(rows)


def expert_table(results: Results) -> str:
    """What became of the experts and the routers, least to most over layers and seeds."""
    head = ["", "arm", "experts apart, share of their mean's norm", "entropy of the routers, share of log E"]
    rows = [head, ["---"] * len(head)]
    for subject in SUBJECTS:
        for arm in (UPCYCLED, SCRATCH):
            found = [
                sorted(value for values in by_seed(results, subject, arm, key).values() for value in values)
                for key in ("experts_apart", "router_entropy")
            ]
            if all(found):
                rows.append([subject, f"`{arm}`", *(f"{values[0]:.2f} to {values[-1]:.2f}" for values in found)])
    return _markdown(rows)


def variant_table(results: Results) -> str:
    """The Mixer's `upcycled` with one change each, one seed; only what is finished."""
    head = ["Mixer, seed 0", "steps", "top-1", "against `upcycled`", "against `continued`"]
    rows = [head, ["---"] * len(head)]
    for arm in (UPCYCLED, *VARIANTS):
        for seed, top1 in by_seed(results, "mixer", arm).items():
            if seed == 0:
                steps = by_seed(results, "mixer", arm, "steps")[0]
                others = [by_seed(results, "mixer", other).get(0) for other in (UPCYCLED, CONTINUED)]
                ahead = ["" if other is None else f"{100 * (top1 - other):+.2f}" for other in others]
                rows.append([arm, f"{steps:,}", f"{100 * top1:.2f}", *ahead])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def seam_figure(results: Results) -> Figure:
    """Training loss over the multiply-adds spent, mean of the seeds, from half of `dense` on; one panel a model."""
    subjects = [subject for subject in SUBJECTS if by_seed(results, subject, DENSE)]
    figure = Figure(figsize=(3.4 * len(subjects), 3.2), layout="constrained")
    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        seam = max(by_seed(results, subject, DENSE, "training_macs").values()) / _TERA
        for arm in ARMS:
            curves, macs = by_seed(results, subject, arm, "curve"), by_seed(results, subject, arm, "macs")
            if not curves:
                continue
            steps = np.array(next(iter(curves.values()))["step"])
            spent = training_macs(next(iter(macs.values())), steps) / _TERA + seam * (arm in (CONTINUED, UPCYCLED))
            loss = np.mean([curve["loss"] for curve in curves.values()], axis=0)
            shown = spent > seam / 2
            axes.plot(spent[shown], loss[shown], label=f"{arm} ({len(curves)})", linewidth=1.2)
        axes.axvline(seam, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(subject, fontsize=9)
        axes.set_xlabel("tera-multiply-adds of training")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="arm (seeds)", title_fontsize=7)
    figure.axes[0].set_ylabel("training loss, smoothing 0.1")
    return figure
