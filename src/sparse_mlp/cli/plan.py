"""The table of `sparse-mlp info MODEL --gpus N`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sparse_mlp.cli.output import table
from sparse_mlp.distributed.cost import StepCost
from sparse_mlp.distributed.plan import GIB, TFLOPS, Hardware, Plan

SHOWN = 12


def show_plans(out: Console, name: str, cost: StepCost, found: list[Plan], hardware: Hardware) -> None:
    """The best meshes of a model, what each needs, and what the estimate assumes."""
    gpus = found[0].mesh.size
    out.print(
        f"{name}: {cost.dense + cost.experts:,} parameters, {cost.experts:,} of them in experts; a step of "
        f"{cost.images * gpus:,} images on {gpus:,} GPUs, {cost.images:,} each, {cost.flops / 2e12:,.2f} T multiply-"
        "adds a GPU forward and backward",
        soft_wrap=True,
    )
    out.print(_meshes(found[:SHOWN], hardware))
    if len(found) > SHOWN:
        out.print(f"{len(found) - SHOWN} more meshes, each behind these")
    out.print(
        "Memory and bytes are counted, experts evenly loaded. Times are estimates, not measured: products at "
        f"{hardware.tflops or TFLOPS[cost.product_size]:g} TFLOP/s, memory {hardware.bandwidth:g} TB/s, links "
        f"{hardware.node_link:g} GB/s among {hardware.node} GPUs and {hardware.link:g} GB/s beyond, "
        f"{hardware.latency:g} us a message; reductions beside the products, rows not.",
        soft_wrap=True,
    )


def _meshes(found: list[Plan], hardware: Hardware) -> Table:
    memory = ("weights", "grads", "optim", "activ", "buffers", "GiB/GPU")
    shown = table("data x expert", *memory, "MB: all", "data", "expert", "ms/step", "of it rows", numbers=11)
    for one in found:
        mesh, held, sent = one.mesh, one.memory, one.traffic.by_axis
        parts = (held.weights, held.gradients, held.optimizer, held.activations, held.buffers, held.total)
        shown.add_row(
            f"{mesh.data} x {mesh.expert}" + (" shard" if mesh.shard else ""),
            *(f"{part / GIB:,.2f}" for part in parts),
            *(f"{size / 1e6:,.1f}" for size in sent.values()),
            f"{1e3 * one.seconds.total:,.1f}" if one.fits else f"over {hardware.memory:g} GiB",
            f"{1e3 * one.seconds.rows:,.1f}",
        )
    return shown
