"""How much of a MoCo v3 step is spent in the encoders.

    python benchmarks/pretrain.py --recipe cifar10_moco_sparse --threads 2 --rounds 5

Alternates, on the same batches, the whole update (augmentation in this process, both views, momentum encoder, heads,
loss, backward, optimiser) with the encoders' share of it: the online encoder forward and backward and the momentum
encoder forward, on both views. Prints medians and their ratio, and writes JSON with --out. Waiting for data is not in
here, a run measures it: `data_time` in its metrics.jsonl.
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

import torch

from sparse_mlp.engine.learner import Learner
from sparse_mlp.recipes.pretrain import build_pretraining, get_pretraining, resolve
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10_moco_sparse")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = resolve(get_pretraining(given.recipe))
    recipe = replace(recipe, data=replace(recipe.data, workers=0, download=False))
    job = build_pretraining(recipe)
    learner = Learner(job.task, recipe.optim, recipe.train, torch.device("cpu"))
    batches = iter(job.loaders.train(start_step=0, steps=given.rounds + 1))
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
    result |= {"seconds": medians, "shares": shares}
    print(
        f"{recipe.name}, batch {recipe.data.batch_size}, {given.threads} threads: update {medians['update']:.3f} s, of "
        f"which encoders {shares['encoders']:.1%}; making both views takes {shares['views']:.1%} of an update, in one "
        "process"
    )
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
