"""`sparse-mlp compare`: several recipes or runs, one table and one page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparse_mlp import distributed, jobs, recipes
from sparse_mlp.cli.output import add_row, console, table
from sparse_mlp.cli.parse import HELP_ALL, parse_known, split_names
from sparse_mlp.cli.train import change
from sparse_mlp.errors import UserError
from sparse_mlp.files import writing_into
from sparse_mlp.jobs import Recipe, Run
from sparse_mlp.report import write_comparison

_log = logging.getLogger(__name__)

_MAX_RUNS = 24  # runs in one comparison


@dataclass(frozen=True)
class CompareOptions:
    out: Path = Path("runs/compare")
    """Folder of the comparison, with a run folder for each recipe."""

    seeds: int | None = None
    """Train each recipe with the seeds 0 to this - 1. Left out: with its own seed."""


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    everything = HELP_ALL in options
    given, rest = parse_known(CompareOptions, [word for word in options if word != HELP_ALL], prog="compare")
    if everything:
        change(recipes.get(names[0] if names else "digits_sparse"), [HELP_ALL], "compare")
    finished = [name for name in names if (Path(name) / "config.json").is_file()]
    requested = _requested_runs([name for name in names if name not in finished], given, rest)
    if not 2 <= len(requested) + len(finished) <= _MAX_RUNS:
        raise UserError(f"compare takes two to {_MAX_RUNS} recipes or runs, not {len(requested) + len(finished)}")
    ignored = rest[:1] or (["--seeds"] if given.seeds is not None else [])
    if finished and ignored and not requested:
        raise UserError(f"{ignored[0]} would be ignored: finished runs are taken as they are")
    check_out(given.out)
    runs = [Run(Path(name)) for name in finished]
    for entry in runs:
        entry.metrics  # noqa: B018 - FileNotFoundError for a run that has not finished
    for folder, recipe in requested.items():  # before anything is trained
        _check(folder, recipe)
    for folder, recipe in requested.items():
        runs.append(_train(folder, recipe))
    if distributed.is_main():
        show_comparison(runs, given.out)
    return 0


def check_out(folder: Path) -> None:
    """UserError for "" and ".": a page and its figures would lie among other files."""
    if not folder.name:
        raise UserError(f"--out {str(folder)!r} names no folder of its own")


def _requested_runs(names: Sequence[str], given: CompareOptions, options: Sequence[str]) -> dict[Path, Recipe]:
    """Run folders and recipes, in the order of the names. UserError for a name or a recipe's name given twice."""
    if len(set(names)) != len(names):
        raise UserError(f"a recipe is named twice: {' '.join(names)}")
    if given.seeds is not None and given.seeds < 1:
        raise UserError(f"--seeds {given.seeds} must be at least 1")
    requested = {}
    for name in names:
        recipe = recipes.resolve(name, partial(change, options=options, prog="compare"))
        if recipe.name != recipes.get(name).name:
            raise UserError(f"--name {recipe.name} would be ignored: each run is called by its recipe; see --out")
        if given.seeds is None:
            requested[given.out / name] = recipe
            continue
        before: Any = getattr(recipes.get(name), "train", None)
        if before is None:
            raise UserError(f"--seeds {given.seeds} would be ignored: {name} trains nothing")
        own: Any = recipe.train  # type: ignore[attr-defined]
        if own.seed != before.seed:
            raise UserError(f"--train.seed {own.seed} would be ignored: --seeds {given.seeds} gives the seeds")
        for seed in range(given.seeds):
            train: Any = replace(own, seed=seed)
            requested[given.out / f"{name}-seed{seed}"] = replace(recipe, train=train)  # type: ignore[call-arg]
    return requested


def _check(folder: Path, recipe: Recipe) -> None:
    """UserError or OSError if the recipe cannot be trained in the folder, or the run there has another recipe."""
    if (folder / "config.json").is_file():
        jobs.check_resume(folder, Run(folder).recipe, recipe)
    else:
        jobs.check(recipe, folder)


def _train(folder: Path, recipe: Recipe) -> Run:
    if not (folder / "config.json").is_file():
        _log.info("%s: training", folder)
        return jobs.train(recipe, folder)
    if Run(folder).folder.results() is None:
        _log.info("%s: going on", folder)
        return jobs.resume(folder, recipe, trusted=True)
    _log.info("%s: finished before", folder)
    return Run(folder)


def show_comparison(runs: Sequence[Run], out: Path) -> None:
    """Print the table; write the page and the figure with the curves of all runs."""
    summaries = [jobs.summarize(entry) for entry in runs]
    metrics = list(dict.fromkeys(name for summary in summaries for name in summary.scores))
    rows = table(
        "run", *metrics, "steps", "parameters", "mult-adds", "items/s", "busiest expert", numbers=len(metrics) + 5
    )
    for entry, summary in zip(runs, summaries, strict=True):
        add_row(
            rows,
            entry.path.name,
            *(summary.scores.get(name, "-") for name in metrics),
            _number(summary.steps, "{:,}"),
            _number(summary.parameters, "{:.2f} M", 1e6),
            _number(summary.macs, "{:.1f} M", 1e6),
            _number(summary.items_per_s, "{:,.0f}"),
            "dense" if summary.busiest is None else f"{summary.busiest:.2f} x its share",
        )
    with writing_into(out):
        page = write_comparison([entry.path for entry in runs], out, [summary.macs for summary in summaries])
    console().print(rows)
    console().print(f"comparison: {page}", markup=False, soft_wrap=True)


def _number(value: float | None, text: str, unit: float = 1) -> str:
    return "-" if value is None else text.format(value / unit if unit != 1 else value)
