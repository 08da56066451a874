"""Sparse-L with many experts on many GPUs: reckoned, not measured, by `sparse_mlp.distributed.plan`.

    python benchmarks/scaling.py [--images 64] [--batch 4096] [--link 50] [--json FILE] [--figure FILE]

For each number of experts (of every layer, token and channel mixing) and of GPUs the best mesh, the estimated step in
bfloat16 and its parts (compute with reductions beside it, rows, update), and images a second and GPU, as it is and if
rows travelled beside the compute too. First with as many images on every GPU, then with one batch divided among them.
The defaults of `Hardware` are the assumptions; the model is on the meta device, so that this runs anywhere in a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

import sparse_mlp  # noqa: F401
from interleaved import print_table, write_json
from sparse_mlp.distributed.cost import StepCost, measure
from sparse_mlp.distributed.plan import GIB, Hardware, Plan, plans

EXPERTS = (16, 64, 256, 1024, 4096)
GPUS = (8, 64, 512, 4096)
MODEL = "sparse_mlp_l16_224"
Row = dict[str, Any]


def cost_of(num_experts: int, images: int) -> StepCost:
    with torch.device("meta"):
        model = timm.create_model(MODEL, num_experts=(num_experts, num_experts))
    return measure(model, images, 3, 224, "bf16")


def best(cost: StepCost, gpus: int, hardware: Hardware) -> Plan | None:
    """The fastest mesh that fits; None if none does."""
    first = plans(cost, gpus, hardware)[0]
    return first if first.fits else None


def row_of(num_experts: int, gpus: int, cost: StepCost, hardware: Hardware) -> Row:
    row: Row = {"E": num_experts, "G parameters": (cost.dense + cost.experts) / 1e9, "GPUs": gpus}
    row["images a GPU"] = cost.images
    plan = best(cost, gpus, hardware)
    if plan is None:
        return row | {"mesh": "does not fit"}
    mesh, time = plan.mesh, plan.seconds
    row |= {"mesh": f"{mesh.data} x {mesh.expert}" + (" shard" if mesh.shard else "")}
    row |= {"GiB": plan.memory.total / GIB, "step ms": 1e3 * time.total, "compute": 1e3 * time.compute}
    row |= {"rows": 1e3 * time.rows, "reductions": 1e3 * time.dense, "images / s GPU": cost.images / time.total}
    row["if overlapped"] = cost.images / min(one.seconds.overlapped for one in plans(cost, gpus, hardware) if one.fits)
    return row


def weak(images: int, hardware: Hardware) -> list[Row]:
    """As many images on every GPU."""
    rows = []
    for num_experts in EXPERTS:
        cost = cost_of(num_experts, images)
        rows += [row_of(num_experts, gpus, cost, hardware) for gpus in GPUS]
    return rows


def strong(batch: int, hardware: Hardware) -> list[Row]:
    """One batch, divided among ever more GPUs."""
    return [row_of(e, gpus, cost_of(e, batch // gpus), hardware) for e in (64, 1024) for gpus in GPUS[1:]]


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, num_experts in enumerate(EXPERTS):
        own = [row for row in rows if row["E"] == num_experts and "GiB" in row]
        gpus = [row["GPUs"] for row in own]
        axes.plot(gpus, [row["images / s GPU"] for row in own], f"C{number}o-", label=f"{num_experts:,} experts")
        axes.plot(gpus, [row["if overlapped"] for row in own], f"C{number}.--", linewidth=0.8)
    axes.set(xscale="log", xlabel="GPUs", ylabel="images / s on each GPU", ylim=(0, None))
    axes.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS], minor=False)
    axes.set_title("Sparse-L, reckoned; dashed: rows travel beside the compute", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="on each GPU")
    parser.add_argument("--batch", type=int, default=4096, help="divided among the GPUs, in the second table")
    parser.add_argument("--link", type=float, default=Hardware.link, help="GB/s of a GPU to other machines")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    hardware = Hardware(link=args.link)
    tables = {f"{args.images} images a GPU": weak(args.images, hardware)}
    tables[f"{args.batch:,} images divided"] = strong(args.batch, hardware)
    for title, rows in tables.items():
        columns = max(rows, key=len)
        print_table(f"{MODEL}, bf16, {title}: reckoned", [{c: row.get(c, "") for c in columns} for row in rows])
    write_json(args.json, [row for rows in tables.values() for row in rows], hardware=vars(hardware))
    if args.figure:
        draw(next(iter(tables.values())), args.figure)


if __name__ == "__main__":
    main()
