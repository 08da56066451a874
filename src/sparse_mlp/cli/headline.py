"""`sparse-mlp headline run | table`: the headline experiment, run by run, and what came out of it."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_mlp import distributed, recipes
from sparse_mlp.cli.parse import parse, split_names
from sparse_mlp.cli.running import check_resume, is_finished, train
from sparse_mlp.cli.showing import console, count_macs
from sparse_mlp.recipes.headline import DRAWN, PARTS, headline_runs
from sparse_mlp.report import Arm, read_run, save_png, study_figure, study_table

_HELP = f"""usage: sparse-mlp headline ACTION ...

The headline experiment on CIFAR-10: Sparse-MLP against dense Mixers of equal multiply-adds and of equal parameters.

  sparse-mlp headline run [PART ...] [--out DIR] [--seeds N]   train what is missing, go on with what was cut
  sparse-mlp headline table [--out DIR] [--to DIR]             table and figures from the finished runs

PART is one of {", ".join(PARTS)}; left out: all of them, in this order.
"""

_HEAD = """<!-- Written by `sparse-mlp headline table`: not by hand. -->

"""


@dataclass(frozen=True)
class RunArguments:
    out: Path = Path("runs/headline")
    """Folder of the experiment; each run has its own in it, PART/MODEL/SEED. Called again, the command goes on where it
    was, to the bit; finished runs are not made again."""

    seeds: int = 3
    """Seeds of each model; the ablations have one."""


@dataclass(frozen=True)
class TableArguments:
    out: Path = Path("runs/headline")
    """Folder of the experiment."""

    to: Path | None = None
    """Folder for results.md and the figures. Left out: the experiment's."""


def run(arguments: list[str]) -> int:
    actions = {"run": _run, "table": _table}
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0 if arguments else 2
    if arguments[0] not in actions:
        near = difflib.get_close_matches(arguments[0], actions, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"unknown action {arguments[0]!r} of headline; allowed are {', '.join(actions)}{hint}")
    actions[arguments[0]](arguments[1:])
    return 0


def _run(arguments: list[str]) -> None:
    names, options = split_names(arguments)
    given = parse(RunArguments, options, prog="headline run", description=_HELP, default=RunArguments())
    progress = console(stderr=True, quiet=not distributed.is_main())
    for planned in headline_runs(tuple(names) or PARTS, given.seeds):
        folder = given.out / planned.name
        if is_finished(folder):
            progress.print(f"{folder}: finished before", markup=False, soft_wrap=True)
            continue
        begun = (folder / "config.json").is_file()
        if begun:
            check_resume(folder, recipes.load(folder), planned.recipe)
        progress.print(f"{folder}: {'going on' if begun else 'training'}", markup=False, soft_wrap=True)
        train(planned.recipe, folder, resume=begun)


def _table(arguments: list[str]) -> None:
    given = parse(TableArguments, arguments, prog="headline table", description=_HELP, default=TableArguments())
    target = given.to or given.out
    written, sections = [], []
    for part in PARTS:
        arms, planned = _arms(part, given.out)
        if not any(arm.runs for arm in arms):
            continue
        target.mkdir(parents=True, exist_ok=True)
        sections.append(f"## {part.capitalize()}\n\n{study_table(arms, planned)}")
        if part in DRAWN:
            written.append(target / f"{part}.png")
            save_png(study_figure(arms, f"CIFAR-10, {part}: test accuracy at equal compute"), written[-1])
    if not sections:
        raise FileNotFoundError(f"there is no finished run of the headline experiment in {given.out}")
    page = target / "results.md"
    page.write_text(_HEAD + "\n".join(sections))
    for path in (page, *written):
        console().print(str(path), markup=False, soft_wrap=True)


def _arms(part: str, out: Path) -> tuple[list[Arm], int]:
    """The models of a part with their finished runs, and how many runs each was to have."""
    planned: dict[str, list[Path]] = {}
    macs: dict[str, int] = {}
    for entry in headline_runs((part,)):
        folder = out / entry.name
        finished = planned.setdefault(entry.arm, [])
        if is_finished(folder):
            finished.append(folder)
            macs.setdefault(entry.arm, _macs(folder))
    seeds = max(len({entry.seed for entry in headline_runs((part,))}), 1)
    arms = [Arm(name, macs.get(name, 0), [read_run(folder) for folder in found]) for name, found in planned.items()]
    return arms, seeds


def _macs(folder: Path) -> int:
    """Multiply-adds of the model of a run, for one of its images."""
    spec = recipes.load_inputs(folder)
    model = recipes.build_model(replace(recipes.load_model_config(folder), weights=None), spec)
    return count_macs(model, spec.channels, spec.image_size)[""]
