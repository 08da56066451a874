"""`sparse-mlp pretrain`: a backbone from images without labels, into a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch.utils.data import IterableDataset

from sparse_mlp.cli.parse import parse, split_names
from sparse_mlp.cli.running import check_resume, save_results, train
from sparse_mlp.cli.showing import console, count_macs
from sparse_mlp.cli.train import join_model_arguments, resumed_folder
from sparse_mlp.data import ImageData
from sparse_mlp.engine import Evaluation, RunFolder
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import load_weights
from sparse_mlp.recipes.pretrain import (
    PRETRAIN_RECIPES,
    PretrainRecipe,
    bank_images,
    build_pretraining,
    get_pretraining,
    load_pretraining,
    resolve,
)
from sparse_mlp.report.pretraining import Neighbourhood, write_pretraining_report
from sparse_mlp.report.samples import example_rows, picture
from sparse_mlp.tasks.features import extract_features
from sparse_mlp.tasks.knn import nearest

_MAP_IMAGES = 2000  # test images in the map of a report
_NEIGHBOURS = 6  # shown of each example

_DESCRIPTION = f"""Pre-train a backbone by MoCo v3, without labels.

    sparse-mlp pretrain RECIPE [--out DIR] [--any.field VALUE ...]

    sparse-mlp pretrain --resume RUN

RECIPE is one of {", ".join(PRETRAIN_RECIPES)}. Its fields, or the defaults if none is named, are the options below;
--model.name takes any model of timm's.

On several GPUs or processes: torchrun --nproc-per-node N -m sparse_mlp pretrain RECIPE ...

Ctrl-C saves; --resume goes on exactly where the run was."""


@dataclass(frozen=True)
class PretrainArguments:
    out: Path | None = None
    """Folder of the new run. Left out: runs/ and the recipe's name, numbered if that exists."""

    resume: Path | None = None
    """Go on with the run in this folder, to the bit as if it had never stopped. Its recipe is taken from there; only
    what does not touch the weights may be changed (saving, logging, workers, device, threads)."""

    recipe: Annotated[PretrainRecipe, tyro.conf.arg(name="")] = field(default_factory=PretrainRecipe)


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if len(names) > 1:
        raise UserError(f"pretrain takes one recipe, not {len(names)} ({', '.join(names)})")
    resumed = resumed_folder(options)
    if not names and not resumed and "--help" not in options and "-h" not in options:
        raise UserError(f"which recipe? sparse-mlp pretrain RECIPE, with one of {', '.join(PRETRAIN_RECIPES)}")
    stored = load_pretraining(resumed) if resumed else None
    default = get_pretraining(names[0]) if names else stored or PretrainRecipe()
    start = PretrainArguments(recipe=default)
    given = parse(PretrainArguments, options, prog="pretrain", description=_DESCRIPTION, default=start)
    recipe = resolve(join_model_arguments(given.recipe, default))
    if resumed and stored:
        if given.out is not None:
            raise UserError(f"--out {given.out} would be ignored: --resume goes on in {resumed}")
        check_resume(resumed, stored, recipe)
    train(recipe, resumed or given.out, resume=resumed is not None, build=build_pretraining, finish=finish)
    return 0


def finish(run: RunFolder, recipe: PretrainRecipe, data: ImageData, result: Evaluation) -> None:
    """What a finished run of pre-training leaves: weights, predictions, report."""
    save_results(run, data, result)
    write_report(run.path, recipe)
    told = ", ".join(f"{name} {value:.2%}" for name, value in result.metrics.items() if name.startswith("knn_"))
    told += f"{', ' if told else ''}features vary in {result.metrics['feature_rank']:.0f} directions"
    console(stderr=True).print(f"{told}; everything is in {run.path}", markup=False, soft_wrap=True)


def write_report(folder: Path, recipe: PretrainRecipe) -> Path:
    """The report of a pre-training run, with the map and the neighbours where its images have numbers."""
    job = build_pretraining(replace(recipe, model=replace(recipe.model, weights=None)))
    backbone, spec = job.task.backbone(), job.data.spec
    macs = count_macs(backbone, spec.channels, spec.image_size)[""]
    try:
        load_weights(backbone, folder)
    except FileNotFoundError:  # no checkpoint yet
        return write_pretraining_report(folder, macs=macs)
    streamed = isinstance(job.data.test, IterableDataset)
    shown = None if streamed or not recipe.task.knn_images else _neighbourhood(recipe, job.data, backbone)
    return write_pretraining_report(folder, shown, macs=macs)


def _neighbourhood(recipe: PretrainRecipe, data: ImageData, backbone: torch.nn.Module) -> Neighbourhood:
    """Features of some test images, and which training images lie nearest to an example of each class."""
    device = torch.device("cpu")
    size, spec = recipe.data.eval_batch_size, data.spec

    def features(images: ImageData, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = (numbers[i : i + size] for i in range(0, len(numbers), size))
        return extract_features(backbone, (images.batch(part) for part in parts), device)  # type: ignore[attr-defined]

    chosen = np.sort(np.random.default_rng(0).permutation(len(data.test))[:_MAP_IMAGES])  # type: ignore[arg-type]
    known, _, known_index = features(data.train, bank_images(recipe, data))  # type: ignore[arg-type]
    test, labels, index = features(data.test, chosen)  # type: ignore[arg-type]
    rows = example_rows(labels.numpy(), seed=0)
    cosines, found = nearest(known, test[rows], _NEIGHBOURS)

    def pictures(images: ImageData, numbers: torch.Tensor) -> tuple[list, list[int]]:
        batch = images.batch(numbers.tolist())  # type: ignore[attr-defined]
        return [picture(image, spec.mean, spec.std) for image in batch["image"]], batch["target"].tolist()

    queries, query_labels = pictures(data.test, index[rows])  # type: ignore[arg-type]
    near = [pictures(data.train, known_index[row]) for row in found]  # type: ignore[arg-type]
    return Neighbourhood(
        features=test.numpy(),
        labels=labels.numpy(),
        names=data.classes,
        queries=list(zip(queries, query_labels, strict=True)),
        neighbours=[list(zip(*both, row.tolist(), strict=True)) for both, row in zip(near, cosines, strict=True)],
    )
