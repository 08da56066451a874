"""A training step of a sparsified model against its dense one, per multiply-add.

    python benchmarks/sparsify.py [--rounds 7] [--threads 1] [--batch 8] [--models NAME ...] [--cpu-time] [--json FILE]

ViT-B/16 and CycleMLP-B1 at 224 px, 8 experts, one an item, in "last-2" and in the second half of the blocks: forward,
backward, float32, dropless, each step in turn within a round; medians of the ratios of times, over the ratio of counted
multiply-adds (a little above 1: the routers). Then how long `sparsify` takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

import interleaved
import sparse_mlp
from interleaved import interleave, print_table, ratio, settle_allocator, write_json
from sparse_mlp.report.cost import count_macs

MODELS = {"vit_base_patch16_224": 6, "cycle_mlp_b1": 5}
"""Names, and half of their blocks."""


def train_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return run


def measure(name: str, half: int, batch: int, rounds: int) -> list[dict[str, object]]:
    images = torch.randn(batch, 3, 224, 224)
    models, seconds = {"dense": timm.create_model(name)}, {}
    for blocks in ("last-2", half):
        model = timm.create_model(name)
        start = time.perf_counter()
        models[str(blocks)] = sparse_mlp.sparsify(model, blocks, num_experts=8)
        seconds[str(blocks)] = time.perf_counter() - start
    macs = {key: count_macs(model, 3, 224)[""] for key, model in models.items()}
    times = interleave({key: train_step(model.train(), images) for key, model in models.items()}, rounds, warmup=1)
    return [
        {
            "model": name,
            "blocks": key,
            "time ratio": ratio(times, key, "dense"),
            "multiply-adds ratio": macs[key] / macs["dense"],
            "per multiply-add": ratio(times, key, "dense") * macs["dense"] / macs[key],
            "sparsify, s": took,
            "threads": torch.get_num_threads(),
        }
        for key, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cpu-time", action="store_true", help="on a machine that others use too, with one thread")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    interleaved.USE_CPU_TIME = given.cpu_time
    settle_allocator()
    rows = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for name in given.models:
            rows += measure(name, MODELS[name], given.batch, given.rounds)
    print_table("A training step of a sparsified model against its dense one", rows)
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
