"""Several models with several seeds each: a table of means and spreads, and curves at equal compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparse_mlp.report import RunData

_TERA = 1e12
_COLUMNS = (
    "model",
    "parameters",
    "mult-adds an image",
    "steps",
    "mult-adds of training",
    "top-1, mean ± sd",
    "seeds",
    "against the first",
    "training time",
    "busiest expert",
)


@dataclass(frozen=True)
class Arm:
    """One model of a study: its finished runs, one a seed, and what they cost."""

    name: str
    macs: int
    """Multiply-adds of an image."""
    parameters: int
    runs: list[RunData]
    accuracies: list[float] = field(default_factory=list)
    """Of each run, as a share of 1."""
    passes: float = 3.0
    """Forward passes that a training step costs an image; a backward pass counts as two."""
    before: float = 0.0
    """Multiply-adds that were spent before these runs, on pre-training."""

    @property
    def spent(self) -> float:
        """Multiply-adds of training, in one run and before it."""
        return self.before + float(training_cost(self, self.runs[0], self.runs[0].last_step))


def training_cost(arm: Arm, run: RunData, steps: Any) -> Any:
    """Multiply-adds of training up to each of some steps."""
    return steps * (arm.passes * arm.macs * run.config["data"]["batch_size"])


def arm_results(arm: Arm) -> dict[str, Any]:
    """The figures of an arm as results.json holds them."""
    return {
        "top1": arm.accuracies,
        "parameters": arm.parameters,
        "macs": arm.macs,
        "steps": arm.runs[0].last_step,
        "training_macs": arm.spent,
        "seconds": [run.seconds for run in arm.runs],
        "busiest": busiest_loads(arm.runs),
    }


def study_table(arms: Sequence[Arm], planned: int) -> str:
    """A Markdown table, one row an arm with runs; the first arm is what the others are compared with.

    The spread is the standard deviation over the seeds (n - 1), the difference is paired by seed where both have them.
    """
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for arm in (arm for arm in arms if arm.runs):
        cells = [
            arm.name,
            f"{arm.parameters / 1e6:.2f} M",
            f"{arm.macs / 1e6:.1f} M",
            f"{arm.runs[0].last_step:,}",
            f"{arm.spent / _TERA:.1f} T",
            spread(arm.accuracies),
            f"{len(arm.accuracies)} of {planned}",
            "" if arm is arms[0] or not arms[0].runs else difference(arm, arms[0]),
            f"{mean(run.seconds for run in arm.runs) / 60:.1f} min",
            busiest(arm.runs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(accuracies: Sequence[float]) -> str:
    """`62.10 ± 0.35 %`, of one run without a deviation."""
    if len(accuracies) < 2:
        return f"{100 * accuracies[0]:.2f} %" if accuracies else "-"
    return f"{100 * mean(accuracies):.2f} ± {100 * stdev(accuracies):.2f} %"


def difference(arm: Arm, first: Arm) -> str:
    """Points of accuracy over the first arm, over the seeds that both have."""
    pairs = list(zip(arm.accuracies, first.accuracies, strict=False))
    found = [100 * (own - other) for own, other in pairs]
    deviation = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
    return f"{mean(found):+.2f}{deviation}"


def busiest_loads(runs: Sequence[RunData]) -> list[float]:
    """For each run with measured routing, the largest load of any expert of any layer over its fair share."""
    loads = [[layer.final_load() for layer in run.routing.values()] for run in runs if run.routing]
    return [max(float(load.max()) * len(load) for load in layers) for layers in loads]


def busiest(runs: Sequence[RunData]) -> str:
    """The mean over the runs of the busiest expert's load over its share."""
    found = [load for load in busiest_loads(runs) if load > 0]
    return f"{mean(found):.2f} x" if found else "-"


def study_figure(arms: Sequence[Arm], metric: str, label: str) -> Figure:
    """Accuracy in each evaluation over multiply-adds of training: the mean of an arm's runs, a band worst to best."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for arm in (arm for arm in arms if arm.runs):
        curves = [(training_cost(arm, run, run.evals.step) / _TERA, 100 * run.evals.get(metric)) for run in arm.runs]
        curves = [(x, y) for x, y in curves if len(x)]
        if not curves:
            continue
        x = min((x for x, _ in curves), key=len)
        rows = np.stack([np.interp(x, *curve) for curve in curves])
        (line,) = axes.plot(x, rows.mean(axis=0), marker="o", markersize=2.4, label=arm.name)
        if len(rows) > 1:
            axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=line.get_color(), alpha=0.18, linewidth=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("tera-multiply-adds of training; a backward pass counts as two forward passes")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
