"""The mixing operators against the published ones: python benchmarks/operators.py [--threads 1 2] [--json out.json]

float32 on a CPU, interleaved, medians. "ours" is the operator as the models call it, on (B, H, W, C) maps; "published"
is the form in benchmarks/published.py. "product" is the plain 1x1 product alone, the work that no form can avoid;
"bound" is the same number of multiply-adds at the peak measured with a large square product.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import interleaved
from interleaved import Row, compare, peak_gflops, settle_allocator, write_json
from published import DeformCycleFC, HireMixer, roll_shift
from sparse_mlp.mixing.axial_shift import axial_offsets, axial_shift
from sparse_mlp.mixing.channel_shift import shift_channels
from sparse_mlp.mixing.cycle_fc import CycleFC
from sparse_mlp.mixing.linear import Linear
from sparse_mlp.models.hire_mlp import HireMixer as OurHireMixer

BATCH = 8
CYCLE_SHAPES = {(64, 56): 10.0, (128, 28): 5.0, (320, 14): 3.0, (512, 7): 2.3}  # (channels, side): ratio asked for
CYCLE_TRAIN_SHAPES = {(64, 56): 10.0, (320, 14): 5.0}


def bound_ms(macs: float, gflops: float) -> float:
    return 2e-6 * macs / gflops


@torch.inference_mode()
def cycle_forward(gflops: float) -> list[Row]:
    rows = []
    for (dim, side), at_least in CYCLE_SHAPES.items():
        x = torch.randn(BATCH, side, side, dim)
        for kernel, axis in (((1, 3), 2), ((3, 1), 1)):
            ours, published = CycleFC(dim, dim, axis), DeformCycleFC(dim, dim, kernel)
            product, plain = Linear(dim, dim), nn.Linear(dim, dim)
            nchw = x.permute(0, 3, 1, 2).contiguous()
            rows.append(
                compare(
                    f"CycleFC {kernel} forward, {BATCH}x{dim}x{side}x{side}",
                    {
                        "ours": lambda ours=ours, x=x: ours(x),
                        "published": lambda published=published, x=nchw: published(x),
                        "product": lambda product=product, x=x: product(x),
                        "F.linear": lambda plain=plain, x=x: plain(x),
                    },
                    at_least=at_least,
                    bound_ms=bound_ms(x.numel() * dim, gflops),
                    against={"ours/product": "product", "ours/F.linear": "F.linear"},
                )
            )
    return rows


def cycle_training(gflops: float) -> list[Row]:
    rows = []
    for (dim, side), at_least in CYCLE_TRAIN_SHAPES.items():
        x = torch.randn(BATCH, side, side, dim, requires_grad=True)
        nchw = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()
        grad = torch.randn(BATCH, side, side, dim)
        grad_nchw = grad.permute(0, 3, 1, 2).contiguous()
        modules = {
            "ours": CycleFC(dim, dim, 2),
            "published": DeformCycleFC(dim, dim, (1, 3)),
            "product": Linear(dim, dim),
        }

        def step(name: str, modules=modules, inputs=(x, nchw), grads=(grad, grad_nchw)) -> None:
            which = 1 if name == "published" else 0
            modules[name](inputs[which]).backward(grads[which])

        rows.append(
            compare(
                f"CycleFC (1, 3) forward + backward, {BATCH}x{dim}x{side}x{side}",
                {name: lambda name=name, step=step: step(name) for name in modules},
                at_least=at_least,
                bound_ms=bound_ms(3 * x.numel() * dim, gflops),
                against={"ours/product": "product"},
            )
        )
    return rows


@torch.inference_mode()
def axial_shifts() -> list[Row]:
    rows = []
    x = torch.randn(BATCH, 56, 56, 96)
    nchw = x.permute(0, 3, 1, 2).contiguous()
    offsets = axial_offsets(96, 5)
    assert torch.equal(axial_shift(x, 5, 2).permute(0, 3, 1, 2), roll_shift(nchw, 5, 3))
    cases = [(2, 3, "horizontal"), (1, 2, "vertical")]
    for (axis, dim, name), (layout, ours) in itertools.product(
        cases, (("NCHW", nchw.permute(0, 2, 3, 1)), ("NHWC", x))
    ):
        rows.append(
            compare(
                f"axial shift, {name}, {BATCH}x96x56x56, {layout} memory",
                {
                    "ours": lambda axis=axis, ours=ours: shift_channels(ours, offsets, axis),
                    "published": lambda dim=dim: roll_shift(nchw, 5, dim),
                    "copy": lambda: x.clone(),
                },
                at_least=3.5,
                against={"ours/copy": "copy"},
                rounds=25,
            )
        )
    return rows


def axial_training() -> list[Row]:
    x = torch.randn(BATCH, 56, 56, 96, requires_grad=True)
    nchw = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()
    grad, grad_nchw = torch.randn_like(x), torch.randn_like(nchw)
    return [
        compare(
            f"axial shift forward + backward, {name}, {BATCH}x96x56x56, NHWC memory",
            {
                "ours": lambda axis=axis: torch.autograd.grad(axial_shift(x, 5, axis), x, grad),
                "published": lambda dim=dim: torch.autograd.grad(roll_shift(nchw, 5, dim), nchw, grad_nchw),
                "two copies": lambda: (x.detach().clone(), grad.clone()),
            },
            against={"ours/copies": "two copies"},
            rounds=25,
        )
        for axis, dim, name in ((2, 3, "horizontal"), (1, 2, "vertical"))
    ]


@torch.inference_mode()
def hire_mixers(gflops: float) -> list[Row]:
    rows = []
    for dim, side, region, step in ((64, 56, 4, 2), (128, 28, 3, 0), (320, 14, 3, 1), (512, 7, 2, 1)):
        x = torch.randn(BATCH, side, side, dim)
        nchw = x.permute(0, 3, 1, 2).contiguous()
        ours, published = OurHireMixer(dim, region, step).eval(), HireMixer(dim, region, step).eval()
        rows.append(
            compare(
                f"Hire mixer, region {region} step {step}, {BATCH}x{dim}x{side}x{side}",
                {"ours": lambda ours=ours, x=x: ours(x), "published": lambda p=published, x=nchw: p(x)},
                bound_ms=bound_ms(x.numel() * dim * 4, gflops),
            )
        )
    return rows


@torch.inference_mode()
def products(gflops: float) -> list[Row]:
    """The product alone, with GELU: ours against nn.Linear and F.gelu, the widest map of each stage's MLP."""
    rows = []
    for dim, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
        x = torch.randn(BATCH, side, side, dim)
        ours, plain = Linear(dim, 4 * dim, gelu=True), nn.Linear(dim, 4 * dim)
        rows.append(
            compare(
                f"product + GELU, {BATCH}x{side}x{side}, {dim} to {4 * dim}",
                {"ours": lambda ours=ours, x=x: ours(x), "published": lambda plain=plain, x=x: F.gelu(plain(x))},
                bound_ms=bound_ms(x.numel() * 4 * dim, gflops),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for one thread on a machine in use")
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time adds up all threads: use it with --threads 1")
    interleaved.USE_CPU_TIME = args.cpu_time
    torch.manual_seed(0)
    settle_allocator()
    rows, peaks = [], {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        peaks[threads] = gflops = peak_gflops()
        print(f"{threads} thread(s): the largest product runs at {gflops:.0f} GFLOP/s")
        rows += cycle_forward(gflops) + cycle_training(gflops) + axial_shifts() + axial_training()
        rows += hire_mixers(gflops) + products(gflops)
    write_json(args.json, rows, peak_gflops=peaks)


if __name__ == "__main__":
    main()
