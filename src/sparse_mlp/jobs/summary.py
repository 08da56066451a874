"""The row of a run of any kind in the table of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_mlp.jobs.run import Run
from sparse_mlp.report import read_run


@dataclass(frozen=True)
class Summary:
    """What a comparison shows of a run; None where it was not measured or does not apply."""

    scores: dict[str, str]
    """The metrics that its kind is judged by, as text."""

    steps: int | None
    parameters: int | None
    macs: int | None
    """Multiply-adds for one image."""

    items_per_s: float | None
    busiest: float | None
    """Load of the busiest expert of all layers, times the number of experts."""


def summarize(run: Run) -> Summary:
    """FileNotFoundError if the run has not finished."""
    results, measured = run.metrics, read_run(run.path)
    scores = {name: f"{results[name]:.2%}" for name in run.job.scores if name in results}
    loads = [routing.final_load() for routing in measured.routing.values()]
    parameters, macs = run.job.cost(run.folder)
    return Summary(
        scores=scores,
        steps=measured.last_step,
        parameters=parameters,
        macs=macs,
        items_per_s=measured.items_per_s,
        busiest=max((float(load.max()) * len(load) for load in loads), default=None),
    )
