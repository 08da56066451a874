"""`sparse-mlp probe`: what the features of a pre-trained backbone are worth, without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from sparse_mlp import distributed, recipes
from sparse_mlp.cli.parse import split_names
from sparse_mlp.cli.pretrained import AFTERWARDS, SOURCES, recipe_from
from sparse_mlp.cli.running import train
from sparse_mlp.cli.showing import console, table
from sparse_mlp.data import AugmentConfig, build_datasets, eval_loader
from sparse_mlp.engine.run import write_json
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import Recipe
from sparse_mlp.report import read_run
from sparse_mlp.tasks import knn_accuracy

_DESCRIPTION = f"""Measure the features of a pre-trained backbone, which stays as it is.

    sparse-mlp probe SOURCE [--kind linear|knn|both] [--out DIR] [--any.field VALUE ...]

knn: each test image is classified by its nearest training images (cosine of the features); takes one pass over the
images and no training. linear: a linear classifier is trained on the features of cropped and flipped images by MoCo
v3's recipe (90 epochs of SGD). The backbone is in evaluation mode, and is checked to end bit for bit as it began.

{SOURCES} Without --data.name a run folder is probed on its own images.

{AFTERWARDS}"""

_OF_TRAINING = ("--optim.", "--schedule.", "--augment.", "--task.", "--train.")
_OF_BOTH = ("--train.device", "--train.threads")
_OF_KNN = ("--k", "--temperature")


@dataclass(frozen=True)
class ProbeArguments:
    kind: Literal["linear", "knn", "both"] = "both"
    """Which classifier: linear, knn (nearest neighbours), or both."""

    k: int = 20
    """Neighbours that vote."""

    temperature: float = 0.07
    """Of the votes: a neighbour counts exp(cosine / temperature)."""

    out: Path | None = None
    """Folder of the linear probe's run, with knn.json in it. Left out: runs/ and the recipe's name, numbered if that
    exists; for knn alone nothing is written then."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if len(names) > 1:
        raise UserError(f"probe takes one SOURCE, not {len(names)} ({', '.join(names)})")
    given: ProbeArguments = recipe_from(
        (*names, "")[0],
        recipes.get("linear_probe"),
        options,
        ProbeArguments,
        own_data=True,
        prog="probe",
        description=_DESCRIPTION,
    )
    _check_used(given.kind, options)
    found: dict[str, dict[str, float]] = {}
    out = given.out
    if given.kind != "knn":
        out = train(given.recipe, out)
    with distributed.join(given.recipe.train.device) as device:
        if given.kind != "linear" and distributed.is_main():
            found["knn"] = measure_knn(given.recipe, device, k=given.k, temperature=given.temperature, out=out)
        if distributed.is_main():
            _show(given.kind, out, found)
    return 0


def measure_knn(
    recipe: Recipe, device: torch.device, *, k: int = 20, temperature: float = 0.07, out: Path | None = None
) -> dict[str, float]:
    """Accuracy of the nearest neighbours in the recipe's data with its weights, also as `knn.json` in `out`."""
    data = build_datasets(recipe.data, AugmentConfig())
    model = recipes.build_model(recipe.model, data.spec).to(device)
    unaugmented = eval_loader(replace(data, test=data.train), recipe.data)
    classes = len(data.classes)
    test = eval_loader(data, recipe.data)
    metrics = knn_accuracy(model, unaugmented, test, classes, device, k=k, temperature=temperature)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "knn.json", {**metrics, "k": k, "temperature": temperature, "weights": recipe.model.weights})
    return metrics


def _check_used(kind: str, options: Sequence[str]) -> None:
    """ValueError for an option that the kind of probe would ignore."""
    given = [word.split("=")[0] for word in options if word.startswith("--")]
    if kind == "knn":
        ignored = [word for word in given if word.startswith(_OF_TRAINING) and word not in _OF_BOTH]
    else:
        ignored = [word for word in given if kind == "linear" and word in _OF_KNN]
    if ignored:
        raise UserError(f"{ignored[0]} would be ignored by --kind {kind}")


def _show(kind: str, out: Path | None, found: dict[str, dict[str, float]]) -> None:
    shown = table("probe", "top-1", "top-5", "images", numbers=3)
    if kind != "knn":
        assert out is not None, "a linear probe has a run folder"
        measured = read_run(out)
        assert measured.predictions is not None and measured.top1 is not None, "the run was finished"
        found_of = measured.predictions
        shown.add_row("linear", f"{measured.top1:.2%}", f"{found_of.top5:.2%}", f"{len(found_of.target):,}")
    for name, metrics in found.items():
        shown.add_row(name, f"{metrics['top1']:.2%}", f"{metrics['top5']:.2%}", f"{metrics['images']:,}")
    console().print(shown)
