"""A study of several models with several seeds each: a table of means and spreads, and curves at equal compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparse_mlp.report.analysis import balance
from sparse_mlp.report.compare_curves import compute
from sparse_mlp.report.curves import percent, plain, round_ticks
from sparse_mlp.report.run import Run
from sparse_mlp.report.style import RUN_STYLES, panel, styled
from sparse_mlp.report.style import title as set_title

_TERA = 1e12


@dataclass(frozen=True)
class Arm:
    """One model of a study: its finished runs, one a seed, and what they cost."""

    name: str
    macs: int
    """Multiply-adds of an image."""
    runs: list[Run]
    scores: list[float] = field(default_factory=list)
    """Accuracy of each run, where it is not the run's own top-1."""
    passes: float = 3.0
    """Forward passes that a training step costs an image; a backward pass counts as two."""
    before: float = 0.0
    """Multiply-adds that were spent before these runs, on pre-training."""

    @property
    def accuracies(self) -> list[float]:
        return self.scores or [run.top1 for run in self.runs if run.top1 is not None]

    @property
    def spent(self) -> float:
        """Multiply-adds of training, in one run and before it."""
        run = self.runs[0]
        return self.before + self.passes * self.macs * run.last_step * run.config["data"]["batch_size"]


def study_table(arms: Sequence[Arm], planned: int) -> str:
    """A Markdown table, one row an arm with runs; the first arm is what the others are compared with.

    The spread is the standard deviation over the seeds (n - 1), the difference is paired by seed where both have them.
    """
    head = "| model | parameters | mult-adds an image | steps | mult-adds of training | top-1, mean ± sd | seeds | "
    head += "against the first | training time | busiest expert |"
    lines = [head, "|---" * 10 + "|"]
    for arm in (arm for arm in arms if arm.runs):
        cells = [
            arm.name,
            f"{(arm.runs[0].parameters or 0) / 1e6:.2f} M",
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


def busiest(runs: Sequence[Run]) -> str:
    """The largest load of any expert of any layer, over its fair share; the mean over the runs."""
    loads = [max(balance(layer.final_load()).busiest for layer in run.routing.values()) for run in runs if run.routing]
    if not loads:
        return "not measured" if any(run.has_experts for run in runs) else "dense"  # a frozen model measures none
    return f"{mean(loads):.2f} x"


@styled
def study_figure(arms: Sequence[Arm], heading: str, metric: str = "top1") -> Figure:
    """Accuracy in each evaluation over multiply-adds of training: the mean of an arm's runs, a band worst to best."""
    figure, axes = panel(width=5.2, height=3.2)
    for arm, (colour, dash) in zip((arm for arm in arms if arm.runs), RUN_STYLES, strict=False):
        curves = [(compute(run, run.evals.step, arm.macs, arm.passes), run.evals.get(metric)) for run in arm.runs]
        known = [(np.asarray(x) / _TERA, y) for x, y in curves if x is not None and len(x)]
        if not known:
            continue
        x = min((x for x, _ in known), key=len)
        rows = np.stack([np.interp(x, own, y) for own, y in known])
        axes.plot(x, rows.mean(axis=0), color=colour, linestyle=dash, marker="o", markersize=2.4, label=arm.name)
        if len(rows) > 1:
            axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("tera-multiply-adds of training; a backward pass counts as two forward passes")
    axes.xaxis.set_major_locator(round_ticks(6))
    axes.yaxis.set_major_locator(round_ticks(6))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.legend(loc="best", labelcolor="linecolor")
    set_title(axes, heading)
    return figure
