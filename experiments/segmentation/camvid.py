"""CamVid: the four families' smallest backbones beside a ResNet and a transformer, for equal multiply-adds.

    python -m experiments.segmentation.camvid --runs runs/camvid --json experiments/segmentation/results/camvid.json

All from random weights, with the same Semantic FPN head and the same settings, three seeds. A model's number of steps
follows from its multiply-adds, so that every run has the same budget of them. Runs are resumed where they were
stopped; `--table` prints the table of what is finished.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.runs import finish, is_finished
from sparse_mlp import recipes
from sparse_mlp.engine.run import environment
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.jobs.segment import SegmentJob, SegmentRecipe
from sparse_mlp.report.cost import count_macs, count_parameters

CLASSES = 11
BUDGET = 1.8e12
"""Multiply-adds of all training images' forward passes."""

MODELS = {
    "cycle_mlp_b1": {},
    "hire_mlp_tiny": {},
    "as_mlp_tiny": {},
    # A patch of 16 pixels in crops of 128 leaves 64 positions; four of the eight blocks are sparse.
    "sparse_mlp_s16_224": {},
    "resnet18": {},
    "pvt_v2_b1": {},
}
SEEDS = (0, 1, 2)


def recipe(model: str, seed: int, root: str) -> tuple[SegmentRecipe, int, int]:
    """The recipe of a run, and the model's multiply-adds for one crop and its parameters."""
    base = recipes.get("camvid")
    assert isinstance(base, SegmentRecipe)
    base = replace(
        base,
        name=f"camvid-{model}-{seed}",
        model=ModelConfig(model, MODELS[model]),
        data=replace(base.data, root=root, image_size=128, short_side=180),
    )
    built = SegmentJob.build(base, ("",) * CLASSES)
    macs, size = count_macs(built, 3, 128)[""], count_parameters(built)
    steps = round(BUDGET / macs / base.data.batch_size)
    train = replace(base.train, epochs=None, steps=steps, seed=seed, threads=1, log_every=10, save_every=100)
    return replace(base, train=train), macs, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/camvid", help="folder of CamVid")
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the rows, the machine and the date here")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        for model in MODELS:
            one, macs, size = recipe(model, seed, args.data)
            folder = args.runs / f"{model}-{seed}"
            if args.table and not is_finished(folder):
                continue
            run = finish(one, folder)
            row = rows.setdefault(model, {"macs": macs, "parameters": size, "steps": one.train.steps, "miou": []})
            row["miou"].append(run.metrics["miou"])
            row.setdefault("pixel_accuracy", []).append(run.metrics["pixel_accuracy"])
            print(f"{model} seed {seed}: mean IoU {run.metrics['miou']:.2%}", flush=True)
    print(table(rows))
    if args.json is not None:
        machine = {name: value for name, value in environment().items() if name != "command"}  # it has paths
        content = {"budget": BUDGET, "environment": machine, "models": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| backbone | parameters | multiply-adds a crop | steps | mean IoU, % | pixels, % |",
        "|---|---|---|---|---|---|",
    ]
    for model, row in rows.items():
        iou, pixels = ([100 * value for value in row[name]] for name in ("miou", "pixel_accuracy"))
        spread = f" ± {statistics.stdev(iou):.1f}" if len(iou) > 1 else ""
        lines.append(
            f"| {model} | {row['parameters'] / 1e6:.1f} M | {row['macs'] / 1e9:.2f} G | {row['steps']} | "
            f"{statistics.mean(iou):.1f}{spread} | {statistics.mean(pixels):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
