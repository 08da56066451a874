"""`sparse-mlp headline run | table`: the headline experiment, run by run, and what came out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sparse_mlp import distributed, recipes
from sparse_mlp.cli import pretrain
from sparse_mlp.cli.parse import parse, run_action, split_names
from sparse_mlp.cli.probe import measure_knn
from sparse_mlp.cli.running import check_resume, is_finished, train
from sparse_mlp.cli.showing import console, count_macs
from sparse_mlp.recipes.headline import PARTS, NamedRun, headline_runs
from sparse_mlp.recipes.pretrain import PretrainRecipe, build_pretraining, load_pretraining
from sparse_mlp.recipes.recipe import Recipe
from sparse_mlp.report import Arm, read_run, save_png, study_figure, study_table

_HELP = f"""usage: sparse-mlp headline ACTION ...

The headline experiment on CIFAR-10: Sparse-MLP against dense Mixers of equal multiply-adds and of equal parameters.

  sparse-mlp headline run [PART ...] [--out DIR] [--seeds N]   train what is missing, go on with what was cut
  sparse-mlp headline table [--out DIR] [--to DIR]             table and figures from the finished runs

PART is one of {", ".join(PARTS)}; left out: all of them, in this order.
"""

_HEADINGS = {
    "supervised": "CIFAR-10, supervised from scratch",
    "linear": "CIFAR-10, MoCo v3, then a linear probe",
    "knn": "CIFAR-10, MoCo v3, then the 20 nearest neighbours",
    "finetune": "CIFAR-10, MoCo v3, then fine-tuned",
    "transfer": "A class-balanced fifth of CIFAR-100, MoCo v3 on CIFAR-10, then fine-tuned",
    "ablations": "CIFAR-10, one change to the sparse model at a time",
}

_FIGURES = {
    "supervised": ("CIFAR-10 from scratch: test accuracy at equal compute", "top1"),
    "pretrain": ("CIFAR-10, MoCo v3: kNN accuracy at equal compute", "knn_top1"),
}

# Forward passes an image costs in a step, the backward pass two: two views of the online encoder with a backward pass
# and two of the momentum encoder without; a frozen backbone one; the kNN none that is training.
_PASSES = {"pretrain": 2 * (3 + 1), "linear": 1.0, "knn": 0.0}

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
    return run_action("headline", {"run": _run, "table": _table}, arguments, _HELP)


def _run(arguments: list[str]) -> None:
    names, options = split_names(arguments)
    given = parse(RunArguments, options, prog="headline run", description=_HELP, default=RunArguments())
    progress = console(stderr=True, quiet=not distributed.is_main())
    for planned in headline_runs(tuple(names) or PARTS, given.seeds):
        folder = given.out / planned.name
        if is_finished(folder):
            progress.print(f"{folder}: finished before", markup=False, soft_wrap=True)
        else:
            recipe = _recipe(planned, given.out)
            begun = (folder / "config.json").is_file()
            progress.print(f"{folder}: {'going on' if begun else 'training'}", markup=False, soft_wrap=True)
            _make(recipe, folder, resume=begun)
        if planned.part == "linear" and not (folder / "knn.json").is_file():
            with distributed.join() as device:
                distributed.on_main(partial(measure_knn, recipes.load(folder), device, out=folder))


def _recipe(planned: NamedRun, out: Path) -> Recipe | PretrainRecipe:
    """The run's configuration, with the weights it begins with. FileNotFoundError where these are not finished."""
    if planned.source is None:
        return planned.recipe
    source = out / planned.source
    if not is_finished(source):
        raise FileNotFoundError(f"{planned.name} begins with {source}, which is not finished: run pretrain first")
    return replace(planned.recipe, model=replace(planned.recipe.model, weights=str(source.resolve())))


def _make(recipe: Recipe | PretrainRecipe, folder: Path, *, resume: bool) -> None:
    """One run, from its beginning or from its newest checkpoint to its end."""
    if isinstance(recipe, PretrainRecipe):
        if resume:
            check_resume(folder, load_pretraining(folder), recipe)
        train(recipe, folder, resume=resume, build=build_pretraining, finish=pretrain.finish)
        return
    if resume:
        check_resume(folder, recipes.load(folder), recipe)
    train(recipe, folder, resume=resume)


def _table(arguments: list[str]) -> None:
    given = parse(TableArguments, arguments, prog="headline table", description=_HELP, default=TableArguments())
    target = given.to or given.out
    studies = {part: _arms(part, given.out) for part in (_HEADINGS | _FIGURES)}
    studies = {part: (arms, planned) for part, (arms, planned) in studies.items() if any(arm.runs for arm in arms)}
    if not studies:
        raise FileNotFoundError(f"there is no finished run of the headline experiment in {given.out}")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for part, (title, metric) in _FIGURES.items():
        if part in studies:
            written.append(target / f"{part}.png")
            save_png(study_figure(studies[part][0], title, metric), written[-1])
    page = target / "results.md"
    sections = [f"## {_HEADINGS[part]}\n\n{study_table(*studies[part])}" for part in _HEADINGS if part in studies]
    page.write_text(_HEAD + "\n".join(sections))
    for path in (page, *written):
        console().print(str(path), markup=False, soft_wrap=True)


def _arms(part: str, out: Path) -> tuple[list[Arm], int]:
    """The models of a part with their finished runs, and how many runs each was to have."""
    runs = list(headline_runs(("linear" if part == "knn" else part,)))
    arms = []
    for name in dict.fromkeys(entry.arm for entry in runs):
        mine = [entry for entry in runs if entry.arm == name and is_finished(out / entry.name)]
        if part == "knn":
            mine = [entry for entry in mine if (out / entry.name / "knn.json").is_file()]
        found = [read_run(out / entry.name) for entry in mine]
        if not found:
            arms.append(Arm(name, 0, []))
            continue
        macs = _macs(found[0].path)
        before = 0.0
        if mine[0].source is not None:
            before = Arm(name, macs, [read_run(out / mine[0].source)], passes=_PASSES["pretrain"]).spent
        scores = [json.loads((run.path / "knn.json").read_text())["top1"] for run in found] if part == "knn" else []
        arms.append(Arm(name, macs, found, scores, passes=_PASSES.get(part, 3.0), before=before))
    return arms, len({entry.seed for entry in runs})


def _macs(folder: Path) -> int:
    """Multiply-adds of the model of a run, for one of its images."""
    spec = recipes.load_inputs(folder)
    model = recipes.build_model(replace(recipes.load_model_config(folder), weights=None), spec)
    return count_macs(model, spec.channels, spec.image_size)[""]
