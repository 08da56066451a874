"""The pilots behind the headline experiment's settings (README.md): short trainings on CIFAR-10, one thread.

    SPARSE_MLP_DATA=... python -m experiments.headline.pilots [NAME ...]

Without names it lists them. A pilot is about an epoch long, so that the training loss is that of new images; it prints
the mean loss of each 100 steps, and the test accuracy at the end. One to three minutes each on one core.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10

from sparse_mlp.data.cifar import read_cifar
from sparse_mlp.moe import MoeMlp


@dataclass(frozen=True)
class Pilot:
    model: str
    args: dict[str, Any]
    steps: int
    lr: float
    batch_size: int = 128
    warmup: int = 50
    seed: int = 0
    output_scale: bool = False  # the MoE's output times E / K, what the gates take away at first
    fc2_init: float = 1.0  # of the experts' second layer, times its usual start
    router_init: float = 1.0
    router_lr: float = 1.0  # times the others'


def _dense(width: int, ratios: tuple[float, float], steps: int, lr: float, **rest: Any) -> Pilot:
    args = {"embed_dim": width, "num_blocks": 8, "mlp_ratio": ratios} | rest.pop("args", {})
    return Pilot("mixer_t4_32", args, steps, lr, **rest)


def _sparse(
    width: int, ratios: tuple[float, float], experts: tuple[int, int], steps: int, lr: float, **rest: Any
) -> Pilot:
    args = {"embed_dim": width, "num_blocks": 8, "mlp_ratio": ratios, "sparse_blocks": 4, "num_experts": experts}
    args |= {"top_k": (1, 1), "rerepresent": False} | rest.pop("args", {})
    return Pilot("sparse_mlp_t4_32", args, steps, lr, **rest)


_DENSE, _S = _dense(64, (0.5, 1.03), 400, 4e-3), _sparse(64, (0.5, 1.0), (8, 8), 400, 4e-3)
_P8 = {"patch_size": 8}


def _changed(**args: Any) -> Pilot:
    """The sparse model of width 64 with other arguments."""
    return replace(_S, args=_S.args | args)


PILOTS = {
    **{f"128 dense lr {lr:g}": _dense(128, (0.25, 1.016), 300, lr) for lr in (2e-3, 4e-3, 8e-3)},
    **{f"128 sparse lr {lr:g}": _sparse(128, (0.25, 1.0), (4, 4), 300, lr) for lr in (2e-3, 4e-3, 8e-3)},
    "128 sparse scaled": _sparse(128, (0.25, 1.0), (4, 4), 300, 2e-3, output_scale=True),
    "128 sparse fc2 x 4": _sparse(128, (0.25, 1.0), (4, 4), 300, 2e-3, fc2_init=4.0),
    "64 dense": _DENSE,
    "64 dense seed 1": replace(_DENSE, seed=1),
    "64 sparse": _S,
    "64 sparse seed 1": replace(_S, seed=1),
    "64 sparse 16 + 16": _changed(num_experts=(16, 16)),
    "64 sparse 1 + 8": _changed(num_experts=(1, 8)),
    "64 sparse 8 + 1": _changed(num_experts=(8, 1)),
    "64 sparse no noise": _changed(noise_std=0.0),
    "64 sparse balance 0.1": _changed(balance_weight=0.1),
    "64 sparse capacity 1.25": _changed(capacity_ratio=1.25),
    "64 sparse drop path 0.1": _changed(drop_path_rate=0.1),
    "64 sparse scaled": replace(_S, output_scale=True),
    "64 sparse router x 6": replace(_S, router_init=6.0),
    "64 sparse router lr x 4": replace(_S, router_lr=4.0),
    "64 sparse fine": _changed(num_experts=(8, 16), top_k=(1, 2), expert_hidden=(32, 32)),
    "64 dense 800": replace(_DENSE, steps=800),
    "64 sparse 4 + 4, 800": replace(_changed(num_experts=(4, 4)), steps=800),
    "64 wide": _dense(64, (0.5, 6.375), 400, 4e-3),
    "64 dense batch 32": _dense(64, (0.5, 1.07), 1560, 2e-3, batch_size=32, warmup=150),
    "64 sparse batch 32": replace(_S, steps=1560, lr=2e-3, batch_size=32, warmup=150),
    "patch 8 dense": _dense(64, (0.5, 1.07), 2340, 4e-3, warmup=100, args=_P8),
    "patch 8 sparse": replace(_changed(**_P8), steps=2340, warmup=100),
    "patch 8 wide": _dense(64, (0.5, 6.375), 2340, 4e-3, warmup=100, args=_P8),
    "patch 8, 32 dense": _dense(32, (0.5, 1.07), 2340, 4e-3, warmup=100, args=_P8),
    "patch 8, 32 dense lr 8e-3": _dense(32, (0.5, 1.07), 2340, 8e-3, warmup=100, args=_P8),
    "patch 8, 32 wide": _dense(32, (2.0, 8.0), 2340, 4e-3, warmup=100, args=_P8),
}


def build(pilot: Pilot) -> torch.nn.Module:
    torch.manual_seed(pilot.seed)
    model = timm.create_model(pilot.model, num_classes=10, img_size=32, **pilot.args)
    for layer in (module for module in model.modules() if isinstance(module, MoeMlp)):
        with torch.no_grad():
            layer.experts.fc2.weight.mul_(pilot.fc2_init)
            layer.router.weight.mul_(pilot.router_init)
        if pilot.output_scale:
            scale = layer.num_experts / layer.top_k
            layer.register_forward_hook(lambda _module, _input, output, scale=scale: output * scale)
    return model


def param_groups(model: torch.nn.Module, pilot: Pilot) -> list[dict[str, Any]]:
    """Weights, routers and the rest (biases, norms: no weight decay), each with its factor of the learning rate."""
    named = list(model.named_parameters())
    routers = [p for name, p in named if "router" in name]
    plain = [p for name, p in named if (p.ndim <= 1 or name.endswith("bias")) and "router" not in name]
    taken = {id(p) for p in (*routers, *plain)}
    weights = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": weights, "weight_decay": 0.05, "scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "scale": 1.0},
    ]
    return groups + ([{"params": routers, "weight_decay": 0.05, "scale": pilot.router_lr}] if routers else [])


def run(name: str, pilot: Pilot, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    images, labels, test, test_labels = data
    model = build(pilot).train()
    optimizer = torch.optim.AdamW(param_groups(model, pilot), fused=True)
    padded, size = F.pad(images, (4, 4, 4, 4)), pilot.batch_size
    draw = torch.Generator().manual_seed(pilot.seed)
    order, place, losses, start = torch.randperm(len(images), generator=draw), 0, [], time.process_time()
    for step in range(pilot.steps):
        if place + size > len(images):
            order, place = torch.randperm(len(images), generator=draw), 0
        ids, place = order[place : place + size], place + size
        top, left = (torch.randint(0, 9, (size,), generator=draw).tolist() for _ in range(2))
        flip = torch.rand(size, generator=draw) < 0.5
        x = torch.stack([padded[i, :, y : y + 32, x : x + 32] for i, y, x in zip(ids.tolist(), top, left, strict=True)])
        x = normalize(torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x))
        progress = max(0, step - pilot.warmup) / (pilot.steps - pilot.warmup)
        lr = pilot.lr * min(1, (step + 1) / pilot.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss = F.cross_entropy(model(x), labels[ids], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"{name:26} step {step + 1:5}  loss {mean(losses[-100:]):.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(normalize(part)).argmax(1) for part in test.split(500)])
    right = (guesses == test_labels).float().mean().item()
    seconds = time.process_time() - start
    print(f"{name:26} test {right:.2%}  loss {mean(losses[-100:]):.4f}  {seconds:.0f} CPU s", flush=True)


def normalize(images: Tensor) -> Tensor:
    mean_, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (images.float() / 255 - mean_.view(3, 1, 1)) / std.view(3, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="pilots to run; left out: list them")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in PILOTS]
    if unknown or not args.names:
        parser.exit(2 if unknown else 0, "\n".join([*(f"unknown: {name}" for name in unknown), *PILOTS]) + "\n")
    torch.set_num_threads(1)
    (images, labels), (test, test_labels), _ = read_cifar(
        CIFAR10, Path(os.environ.get("SPARSE_MLP_DATA", "data"), "cifar10"), False
    )
    data = (
        torch.from_numpy(images),
        torch.as_tensor(labels).long(),
        torch.from_numpy(test),
        torch.as_tensor(test_labels),
    )
    for name in args.names:
        run(name, PILOTS[name], data)


if __name__ == "__main__":
    main()
