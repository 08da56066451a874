"""The table of a comparison: runs grouped by recipe, their numbers, and the same as CSV and JSON."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sparse_mlp.report.analysis import balance
from sparse_mlp.report.compare_curves import Group
from sparse_mlp.report.page import NONE, TIMES, count, duration
from sparse_mlp.report.run import SCORES, RunData

# What may differ between the runs of one group: the seed, and where and how often something is written or computed.
_FREE = ("seed", "device", "threads", "log_every", "eval_every", "save_every", "keep_checkpoints")


@dataclass(frozen=True)
class Numbers:
    """What a comparison says of one run; None where it was not measured or does not apply."""

    top1: float | None
    miou: float | None
    box_map: float | None
    steps: int
    parameters: int | None
    multiply_adds: int | None
    items_per_s: float | None
    seconds: float | None
    busiest_expert: float | None
    """Load of the busiest expert of all layers, times the number of experts."""
    idle_experts: int | None


_NUMBERS = tuple(field.name for field in fields(Numbers))


def group_runs(runs: Sequence[RunData], macs: Sequence[int | None]) -> list[Group]:
    """Return the runs by recipe, in the order given: runs whose configurations differ in nothing but the seed."""
    grouped: list[tuple[dict[str, Any], list[RunData], list[int | None]]] = []
    for run, cost in zip(runs, macs, strict=True):
        recipe = _recipe(run)
        same = next((entry for entry in grouped if entry[0] == recipe), None)
        if same is None:
            grouped.append((recipe, [run], [cost]))
        else:
            same[1].append(run)
            same[2].append(cost)
    titles = [str(recipe.get("name") or "") if len(own) > 1 else own[0].name for recipe, own, _ in grouped]
    return [
        Group(_distinct(title, titles, own), own, next((cost for cost in costs if cost is not None), None))
        for title, (_, own, costs) in zip(titles, grouped, strict=True)
    ]


def _recipe(run: RunData) -> dict[str, Any]:
    """Return the configuration without what does not make another recipe."""
    config = deepcopy(run.config)
    for part in [config, config.get("train")]:
        if isinstance(part, dict):
            for name in _FREE:
                part.pop(name, None)
    return config


def _distinct(title: str, titles: Sequence[str], runs: Sequence[RunData]) -> str:
    """Return a title that no other group has: with the parent's folder where two are alike."""
    if title and titles.count(title) == 1:
        return title
    path = runs[0].path.resolve()
    return f"{path.parent.name}/{path.name}"


def numbers(run: RunData, macs: int | None) -> Numbers:
    """The numbers of a run whose model takes `macs` multiply-adds for one item."""
    loads = [balance(routing.final_load()) for routing in run.routing.values()]
    return Numbers(
        top1=run.score("top1"),
        miou=run.score("miou"),
        box_map=run.score("box_map"),
        steps=run.last_step,
        parameters=run.parameters,
        multiply_adds=macs,
        items_per_s=run.items_per_s,
        seconds=run.seconds if run.timed else None,
        busiest_expert=max((layer.busiest for layer in loads), default=None),
        idle_experts=sum(len(layer.dead) for layer in loads) if loads else None,
    )


def table(groups: Sequence[Group]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns, and for each group its `name`, `aside`, and `cells` as (text, whether it is the best)."""
    items = {run.items for group in groups for run in group.runs}
    rate = f"{items.pop().capitalize()}/s" if len(items) == 1 else "Items/s"
    scores = [name for name in SCORES if any(run.score(name) is not None for group in groups for run in group.runs)]
    scores = scores or ["top1"]
    columns = [
        *(SCORES[name] for name in scores),
        "Steps",
        "Parameters",
        "Multiply-adds",
        rate,
        "Training time",
        "Busiest expert",
        "Idle experts",
    ]
    means = [{name: _mean([run.score(name) for run in group.runs]) for name in scores} for group in groups]
    best = {name: max((known for own in means if (known := own[name]) is not None), default=None) for name in scores}
    rows = []
    for group, reached in zip(groups, means, strict=True):
        own = [asdict(numbers(run, group.macs)) for run in group.runs]
        values = {key: [value for entry in own if (value := entry[key]) is not None] for key in _NUMBERS}
        steps = sorted({int(step) for step in values["steps"]})
        dense = not any(run.has_experts for run in group.runs)
        cells = [
            *(spread(values[name]) for name in scores),
            f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}",
            count(_mean(values["parameters"])),
            count(group.macs),
            NONE if not values["items_per_s"] else f"{_mean(values['items_per_s']):,.0f}",
            duration(_mean(values["seconds"])),
            f"{_mean(values['busiest_expert']):.2f} {TIMES}"
            if values["busiest_expert"]
            else "dense"
            if dense
            else NONE,
            f"{_mean(values['idle_experts']):.3g}" if values["idle_experts"] else NONE,
        ]
        model = group.runs[0].model_name
        seeds = f" · {len(own)} seeds" if len(own) > 1 else ""
        leads = [reached[name] is not None and reached[name] == best[name] for name in scores]
        marked = [(cell, i < len(leads) and leads[i]) for i, cell in enumerate(cells)]
        rows.append({"name": group.name, "aside": f"{model}{seeds}", "cells": marked})
    return columns, rows


def spread(accuracies: Sequence[float]) -> str:
    """Return `62.10 ± 0.35 %`: mean and standard deviation (n - 1); of one run without a deviation."""
    if not accuracies:
        return NONE
    deviation = f" ± {100 * stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.2f}{deviation} %"


def summary(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return what comparison.json holds: of each group every number's `mean` and `std` (n - 1), and its runs."""
    entries = []
    for group in groups:
        own = [asdict(numbers(run, group.macs)) for run in group.runs]
        runs = [{"path": str(run.path), "seed": _seed(run), **n} for run, n in zip(group.runs, own, strict=True)]
        entry: dict[str, Any] = {"name": group.name, "model": group.runs[0].model_name, "runs": runs}
        for key in _NUMBERS:
            values = [float(value) for n in own if (value := n[key]) is not None]
            if values:
                entry[key] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}
        entries.append(entry)
    return entries


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """Write one line a run; what was not measured is empty."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "run", "model", "seed", *_NUMBERS])
        for group in groups:
            for run in group.runs:
                values = astuple(numbers(run, group.macs))
                cells = ["" if value is None else value for value in [_seed(run), *values]]
                writer.writerow([group.name, run.path, run.model_name, *cells])


def _seed(run: RunData) -> int | None:
    train = run.config.get("train")
    return train.get("seed") if isinstance(train, dict) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
