"""How much of a MoCo v3 step is spent in the encoders, and what augmenting a whole batch at once saves.

    python benchmarks/pretrain.py --recipe cifar10_moco_sparse --threads 2 --rounds 5

Alternates, on the same batches, the whole update (augmentation in this process, both views, momentum encoder, heads,
loss, backward, optimiser) with the encoders' share of it: the online encoder forward and backward and the momentum
encoder forward, on both views. Prints medians and their ratio, and writes JSON with --json. Waiting for data is not in
here, a run measures it: `data_time` in its metrics.jsonl.

Then augments one batch in the whole-batch form that sets in memory use and by torchvision's transforms, one seeded call
an image, alternately: the recipe's views, and the shifts, crops and rotations of supervised training. Own code for
whole batches stays in the package only where it is at least twice as fast here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

import sparse_mlp
from sparse_mlp.data import AugmentConfig, ViewsConfig
from sparse_mlp.data.augment import DRAWS, BatchAugment
from sparse_mlp.data.randomness import preserved_generators, seed_generators
from sparse_mlp.data.view_transforms import VIEW_DRAWS, BatchView, view_transform
from sparse_mlp.engine.learner import Learner
from sparse_mlp.jobs.pretrain import PretrainJob
from sparse_mlp.tasks.moco import Moco


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def encoders(task: Moco, batch: dict[str, torch.Tensor]) -> None:
    """What the encoders do in an update, in its order."""
    features = [task.encoder(batch[view]) for view in ("view1", "view2")]
    with torch.no_grad():
        for view in ("view1", "view2"):
            task.momentum_encoder(batch[view])
    torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
    task.zero_grad(set_to_none=True)


def one_by_one(config: AugmentConfig, size: int) -> v2.Compose:
    """torchvision's transforms that do what `config` says to one uint8 tensor."""
    steps: list[Any] = []
    if config.rotate:
        steps.append(v2.RandomRotation(config.rotate, v2.InterpolationMode.BILINEAR))
    if config.pad:
        steps.append(v2.RandomCrop(size, padding=config.pad))
    if config.crop_scale != (1.0, 1.0):
        steps.append(v2.RandomResizedCrop(size, config.crop_scale, config.crop_ratio))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    return v2.Compose(steps)


def compare_forms(images: Tensor, views: ViewsConfig, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of either form for a batch of images (B, C, H, W) uint8."""
    size, colours = images.shape[-1], {"mean": (0.5,) * images.shape[1], "std": (0.25,) * images.shape[1]}
    last = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(**colours)])
    pad = size // 8
    supervised = {
        "shift and flip": AugmentConfig(pad=pad, flip=0.5),
        "crop and flip": AugmentConfig(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5),
        "shift and rotation": AugmentConfig(pad=pad, rotate=10.0),
    }
    pairs: dict[str, tuple[Callable, Callable, Callable]] = {
        name: (BatchAugment(config, size, **colours), one_by_one(config, size), last)
        for name, config in supervised.items()
    }
    for number in (0, 1):
        forms = (form(views, number, size, **colours) for form in (BatchView, view_transform))
        pairs[f"view {number + 1}"] = (*forms, lambda batch: batch)

    draws = np.random.default_rng(0).random((len(images), max(DRAWS, VIEW_DRAWS)), dtype=np.float32)

    def library(transform: Callable, finish: Callable) -> Tensor:
        varied = []
        for number, image in enumerate(images):
            seed_generators(number)
            varied.append(transform(image))
        return finish(torch.stack(varied))

    seconds: dict[str, dict[str, float]] = {}
    for name, (batch, transform, finish) in pairs.items():
        taken = [(timed(lambda: batch(images, draws)), timed(lambda: library(transform, finish)))  # noqa: B023
                 for _ in range(rounds + 1)][1:]  # fmt: skip
        whole, single = (statistics.median(column) for column in zip(*taken, strict=True))
        seconds[name] = {"whole_batch": whole, "one_by_one": single}
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10_moco_sparse")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = sparse_mlp.recipe(given.recipe)
    recipe = replace(recipe, data=replace(recipe.data, workers=0, download=False))
    job = PretrainJob(recipe)
    learner = Learner(job.task, recipe.optim, recipe.train, torch.device("cpu"))
    batches = iter(job.loaders.train(start_step=0, steps=given.rounds + 1, rank=0, world_size=1))
    seconds: dict[str, list[float]] = {"views": [], "update": [], "encoders": []}
    for number in range(given.rounds + 1):
        start = time.perf_counter()
        batch = next(batches)
        taken = {"views": time.perf_counter() - start}
        taken["update"] = timed(lambda: learner.update(batch, number, 1000, measure=False))  # noqa: B023 - called now
        taken["encoders"] = timed(lambda: encoders(job.task, batch))  # noqa: B023
        if number:  # the first round warms up
            for name, value in taken.items():
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shares = {name: medians[name] / medians["update"] for name in ("encoders", "views")}
    result = {"recipe": recipe.name, "batch": recipe.data.batch_size, "threads": given.threads, "rounds": given.rounds}
    with preserved_generators():
        sample = job.data.train.images[: recipe.data.batch_size]
        forms = compare_forms(sample, recipe.views, max(given.rounds, 5))
    result |= {"seconds": medians, "shares": shares, "augmentation": forms}
    print(
        f"{recipe.name}, batch {recipe.data.batch_size}, {given.threads} threads: update {medians['update']:.3f} s, of "
        f"which encoders {shares['encoders']:.1%}; making both views takes {shares['views']:.1%} of an update, in one "
        "process"
    )
    for name, taken in forms.items():
        whole, single = taken["whole_batch"], taken["one_by_one"]
        print(f"{name}: whole batch {whole:.4f} s, one by one {single:.4f} s, {single / whole:.1f} times")
    both = sum(forms[f"view {number}"]["one_by_one"] for number in (1, 2))
    print(f"both views one by one: {both / medians['update']:.1%} of an update")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
