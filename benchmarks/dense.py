"""Detectors and segmenters: steps per multiply-add against a ResNet-18, memory over size, the backbone's share.

    python benchmarks/dense.py [--rounds 5] [--threads 1 2] [--json FILE]

Interleaved, medians of ratios within a round; float32 on a CPU. RetinaNet at 320 px, eight objects an image; a step is
forward, backward and a fused AdamW. Multiply-adds are those of the step's matrix products and convolutions, forward and
backward, counted. Then peak memory of a segmenter's step at growing sizes (linear in the pixels: the last column is
level), and where the time of one image of 800 x 1,216 goes at inference.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparse_mlp  # noqa: F401
from interleaved import interleave, print_table, ratio, settle_allocator, write_json
from sparse_mlp.models.detectors import Detector
from sparse_mlp.models.feature_maps import FeatureMaps
from sparse_mlp.models.segmenters import Segmenter, SemanticFpn

MODELS = ("resnet18", "cycle_mlp_b1", "hire_mlp_tiny", "as_mlp_tiny")
SIDES = (128, 192, 256, 320)


def retinanet(name: str) -> Detector:
    torch.manual_seed(0)
    return Detector(FeatureMaps(timm.create_model(name)), "retinanet", 80)


def step(model: nn.Module, batch: int, size: int) -> Callable[[], None]:
    """One update of a detector."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    images = [torch.rand(3, size, size) for _ in range(batch)]
    corners = torch.rand(batch, 8, 2) * (size - 80)
    targets = [
        {"boxes": torch.cat([c, c + 20 + 60 * torch.rand(8, 2)], 1), "labels": torch.randint(0, 80, (8,))}
        for c in corners
    ]

    def run() -> None:
        losses = model.train()(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def training(threads: int, rounds: int, batch: int = 2, size: int = 320) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    steps = {name: step(retinanet(name), batch, size) for name in MODELS}
    macs = {}
    for name, run in steps.items():
        with FlopCounterMode(display=False) as counter:
            run()
        macs[name] = counter.get_total_flops() / 2
    seconds = interleave(steps, rounds)
    return [
        {
            "RetinaNet over": name,
            "threads": threads,
            "multiply-adds of a step, G": macs[name] / 1e9,
            "time to resnet18": ratio(seconds, name, "resnet18"),
            "per multiply-add": ratio(seconds, name, "resnet18") * macs["resnet18"] / macs[name],
        }
        for name in MODELS
    ]


def peak_memory(side: int) -> float:
    """MiB that a training step of CycleMLP-B1 + Semantic FPN adds to the process; measured in one of its own."""
    maps = FeatureMaps(timm.create_model("cycle_mlp_b1"))
    model = Segmenter(maps, SemanticFpn(maps.channels, 11))
    model(torch.rand(1, 3, 64, 64)).mean().backward()
    before = _high_water_mark()
    model(torch.rand(4, 3, side, side)).mean().backward()
    return (_high_water_mark() - before) / 1024


def _high_water_mark() -> int:
    """KiB; getrusage's would be that of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory() -> list[dict[str, object]]:
    rows = []
    for side in SIDES:
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", str(side)], capture_output=True, text=True, check=True
        )
        mib = float(done.stdout)
        rows.append({"side, pixels": side, "MiB": mib, "KiB a pixel": 1024 * mib / (4 * side * side)})
    return rows


def inference(threads: int, rounds: int, size: tuple[int, int] = (800, 1216)) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    rows = []
    for name in MODELS:
        model = retinanet(name).eval()
        image = torch.rand(3, *size)
        shares = []
        with torch.inference_mode():
            for _ in range(rounds):
                start = time.perf_counter()
                model.maps(image[None])
                backbone = time.perf_counter() - start
                start = time.perf_counter()
                model([image])
                shares.append(backbone / (time.perf_counter() - start))
        rows.append({"RetinaNet over": name, "threads": threads, "backbone's share": statistics.median(shares)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the rows and the hardware here")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(peak_memory(args.memory_of))
        return
    settle_allocator()
    everything: list[dict[str, object]] = []

    def show(title: str, rows: list[dict[str, object]]) -> None:
        print_table(title, rows)
        everything.extend({"table": title} | row for row in rows)

    for threads in args.threads:
        show("Training step at 320 px, batch 2", training(threads, args.rounds))
        show("Inference at 800 x 1,216", inference(threads, max(2, args.rounds // 2)))
    show("Peak memory of a step, CycleMLP-B1 + Semantic FPN, batch 4", memory())
    write_json(args.json, everything)


if __name__ == "__main__":
    main()
