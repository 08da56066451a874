"""The header of every page: what ran, when and on which hardware, and the main results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_mlp.report.analysis import balance
from sparse_mlp.report.page import TIMES, Head, Tile, count, duration
from sparse_mlp.report.predictions import Floats
from sparse_mlp.report.run import RunData


def run_head(run: RunData, tiles: Sequence[Tile], *, kind: str = "Run report", title: str | None = None) -> Head:
    """Return the top of a run's page; `title` is the model's name if it is not given."""
    recipe = run.config.get("name") or run.config.get("recipe")
    parts = (recipe, run.name if run.name != recipe else None, _status(run))
    return Head(
        kind=kind,
        title=run.model_name if title is None else title,
        subtitle=" · ".join(str(part) for part in parts if part),
        tiles=list(tiles),
        notes=run.notes,
        facts=facts(run),
    )


def accuracy_tile(run: RunData) -> list[Tile]:
    """Return the top-1 accuracy, where it was measured."""
    if run.top1 is None:
        return []
    number = (
        f"of {len(run.predictions.target):,} test {run.items}" if run.predictions is not None else "last evaluation"
    )
    return [Tile("kNN top-1 accuracy" if run.pretraining else "Top-1 accuracy", f"{100 * run.top1:.2f} %", number)]


def cost_tiles(run: RunData, macs: int | None = None) -> list[Tile]:
    """Return what the model and its training cost, each where it is known."""
    tiles = []
    if run.parameters is not None:
        tiles.append(Tile("Parameters", count(run.parameters)))
    if macs is not None:
        tiles.append(Tile("Multiply-adds", count(macs), "per image, forward"))
    if run.items_per_s is not None:
        tiles.append(Tile("Training speed", f"{run.items_per_s:,.0f}", f"{run.items}/s, median"))
    if run.timed:
        tiles.append(Tile("Training time", duration(run.seconds), "without evaluations"))
    return tiles


def balance_tile(loads: Mapping[str, Floats], where: str = "") -> list[Tile]:
    """Return how evenly the experts are used, from the load (E,) of each layer; nothing where none was measured."""
    if not loads:
        return []
    balances = [balance(load) for load in loads.values()]
    dead = sum(len(layer.dead) for layer in balances)
    idle = "no idle expert" if not dead else f"{dead} idle expert{'s' if dead > 1 else ''}"
    number = f"{max(layer.busiest for layer in balances):.2f} {TIMES}"
    return [Tile("Busiest expert", number, f"its fair share; {idle}{where}")]


def _status(run: RunData) -> str:
    whats = [event.get("what") for event in run.events]
    resumed = whats.count("resumed")
    state = "finished" if "finished" in whats else "stopped" if whats[-1:] == ["stopped"] else "not finished"
    again = {0: "", 1: ", resumed once"}.get(resumed, f", resumed {resumed} times")
    return f"{state} at step {run.last_step:,}{again}"


def facts(run: RunData) -> list[tuple[str, str, bool]]:
    """Return command, commit, date, hardware and versions as (term, value, whether it is code), where known."""
    environment = run.environment
    commit = environment.get("git_commit")
    changed = " with local changes" if environment.get("git_changed") else ""
    versions = environment.get("versions")
    entries = [
        ("Command", _command(environment.get("command")), True),
        ("Commit", f"{str(commit)[:12]}{changed}" if commit else "", True),
        ("Date", str(environment.get("date", "")).replace("T", " ").replace("+00:00", " UTC"), False),
        ("Hardware", _hardware(environment.get("hardware")), False),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "", False),
    ]
    return [entry for entry in entries if entry[1]]


def shared_facts(runs: Sequence[RunData]) -> list[tuple[str, str, bool]]:
    """Return the facts of several runs; one in which they differ has all their values."""
    merged: dict[str, tuple[list[str], bool]] = {}
    for run in runs:
        for term, value, code in facts(run):
            values = merged.setdefault(term, ([], code))[0]
            if value not in values:
                values.append(value)
    return [(term, "; ".join(values), code) for term, (values, code) in merged.items()]


def _command(words: Any) -> str:
    """Return the command line as one would type it."""
    if not isinstance(words, list) or not words:
        return str(words or "")
    program = Path(str(words[0]))
    start = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return f"{start} {shlex.join(map(str, words[1:]))}".strip()


def _hardware(hardware: Any) -> str:
    if not isinstance(hardware, dict):
        return str(hardware or "")
    parts = [str(hardware.get("cpu") or hardware.get("machine") or "")]
    counts = {name: hardware.get(f"{name}s") for name in ("core", "thread")}
    parts += [f"{number} {name}" + ("s" if number != 1 else "") for name, number in counts.items() if number]
    if hardware.get("memory_gib"):
        parts.append(f"{hardware['memory_gib']:g} GiB")
    return ", ".join(part for part in [*parts, *map(str, hardware.get("gpus") or [])] if part)
