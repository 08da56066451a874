"""The row of a run of any kind in the table of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_mlp.jobs.run import Run
from sparse_mlp.report import read_run
from sparse_mlp.report.compare_table import numbers


@dataclass(frozen=True)
class Summary:
    """What a comparison shows of a run; None where it was not measured or does not apply."""

    scores: dict[str, str]
    """The metrics that its kind is judged by, as text."""

    steps: int | None
    parameters: int | None
    macs: int | None
    """Multiply-adds for one item."""

    items_per_s: float | None
    busiest: float | None
    """Load of the busiest expert of all layers, times the number of experts."""


def summarize(run: Run) -> Summary:
    """FileNotFoundError if the run has not finished."""
    results, job = run.metrics, run.job
    parameters, macs = job.cost(run.folder)
    measured = numbers(read_run(run.path), macs)
    return Summary(
        scores={name: f"{results[name]:.2%}" for name in job.scores if name in results},
        steps=measured.steps,
        parameters=measured.parameters if parameters is None else parameters,
        macs=macs,
        items_per_s=measured.items_per_s,
        busiest=measured.busiest_expert,
    )
