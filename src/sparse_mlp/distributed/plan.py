"""What a step costs on every sensible mesh of N GPUs, reckoned before one is paid for: memory, bytes sent, time.

W = data x expert ranks, each with images of its own. Weights outside experts are on every rank (DDP, a ring all-reduce
of their gradients over all ranks) or, with `shard`, spread over all (FSDP2: gathered for forward and again for
backward, gradients reduce-scattered). The experts of a layer are spread over the `expert` axis, E / expert on each
rank, and are copies of each other, or shards, along `data`. Each layer sends rows to the ranks that have their experts
and back, in forward and again in backward. Ranks are numbered with `expert` innermost, so that an expert axis that fits
in a node stays there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from sparse_mlp.distributed.cost import LayerCost, StepCost
from sparse_mlp.distributed.mesh import MeshShape
from sparse_mlp.errors import UserError

GIB = 2**30
TFLOPS = {4: 27.0, 2: 400.0}
COUNT_SIZE = 8
TOTAL_SIZE = 4


@dataclass(frozen=True)
class Hardware:
    """What the estimate of time assumes; the defaults are two fifths of an H100's peak and its links' data sheets.

    memory: GiB of a GPU. tflops: that products reach; None: 27 in float32, 400 in half precision. bandwidth: TB/s of a
    GPU's memory. node: GPUs with fast links to each other. node_link, link: GB/s that a GPU sends within its node and
    to others. latency: microseconds that a message costs whatever its size.
    """

    memory: float = 80.0
    tflops: float | None = None
    bandwidth: float = 3.35
    node: int = 8
    node_link: float = 450.0
    link: float = 50.0
    latency: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{field.name.replace('_', '-')} {value:g} must be above 0")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    activations: most at a time in forward and backward. buffers: rows on their way, and with `shard` the weights
    of two blocks gathered and the gradients of one.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step of one forward and backward; what stays on the rank is not counted.

    dense_gradients: over all ranks. expert_gradients: over `data`. shards: weights gathered, dense_shards over all
    ranks and expert_shards over `data`; reduce-scattered gradients are in the former two. rows, counts: over `expert`.
    balance: sums for the balance loss, over all ranks.
    """

    dense_gradients: int
    expert_gradients: int
    dense_shards: int
    expert_shards: int
    rows: int
    counts: int
    balance: int

    @property
    def by_axis(self) -> dict[str, int]:
        return {
            "all": self.dense_gradients + self.dense_shards + self.balance,
            "data": self.expert_gradients + self.expert_shards,
            "expert": self.rows + self.counts,
        }


@dataclass(frozen=True)
class Seconds:
    """Estimated parts of a step. Gradients and gathered weights travel beside `compute`, rows do not.

    compute: products, at the given speed or that of reading the experts' weights, and results written and read.
    rows: all-to-all. dense: all-reduce, or gather and reduce-scatter. update: reading and writing weights, gradients
    and the optimiser's state.
    """

    compute: float
    rows: float
    dense: float
    update: float

    @property
    def total(self) -> float:
        return max(self.compute, self.dense) + self.rows + self.update

    @property
    def overlapped(self) -> float:
        """The least there could be if rows travelled beside the compute too."""
        return max(self.compute, self.dense, self.rows) + self.update


@dataclass(frozen=True)
class Plan:
    mesh: MeshShape
    memory: Memory
    traffic: Traffic
    seconds: Seconds
    fits: bool


def plans(cost: StepCost, ranks: int, hardware: Hardware, *, states: int = 2, expert: int | None = None) -> list[Plan]:
    """A plan for each sensible mesh of `ranks` GPUs, best first: those that fit by time, then the others by memory.

    `cost`: of one rank's images. `states`: numbers the optimiser keeps a weight. `expert`: only meshes with this axis.
    UserError for an expert axis that the ranks or the experts cannot be divided by.
    """
    found = [plan(cost, mesh, hardware, states=states) for mesh in meshes(cost, ranks, expert)]
    return sorted(found, key=lambda one: (not one.fits, one.seconds.total if one.fits else one.memory.total))


def plan(cost: StepCost, mesh: MeshShape, hardware: Hardware, *, states: int = 2) -> Plan:
    held = memory(cost, mesh, states=states)
    return Plan(
        mesh, held, traffic(cost, mesh), seconds(cost, mesh, hardware, states), held.total <= hardware.memory * GIB
    )


def meshes(cost: StepCost, ranks: int, expert: int | None = None) -> Iterator[MeshShape]:
    """Every division of the ranks into data x expert that gives each rank as many experts, sharded or not."""
    if ranks < 1:
        raise UserError(f"{ranks} GPUs: at least 1 is needed")
    if expert is not None:
        check_expert_axis(cost, ranks, expert)
    common = math.gcd(ranks, *(layer.num_experts for layer in cost.layers)) if cost.layers else 1
    for size in range(1, common + 1) if expert is None else [expert]:
        if common % size == 0:
            for shard in (False, True) if ranks > 1 else (False,):
                yield MeshShape(ranks // size, size, shard)


def check_expert_axis(cost: StepCost, ranks: int, expert: int) -> None:
    """UserError if `expert` ranks cannot share the experts, or not evenly, or do not divide the ranks."""
    if expert < 1 or ranks % expert:
        raise UserError(f"{ranks} GPUs cannot be divided into groups of {expert} that share the experts")
    if expert > 1 and not cost.layers:
        raise UserError(f"the model has no experts that {expert} GPUs could share")
    for layer in cost.layers:
        if layer.num_experts < expert:
            raise UserError(f"{expert} GPUs cannot share the {layer.num_experts} experts of {layer.name}")
        if layer.num_experts % expert:
            raise UserError(f"the {layer.num_experts} experts of {layer.name} cannot be divided by {expert} GPUs")


# Memory


def memory(cost: StepCost, mesh: MeshShape, *, states: int = 2) -> Memory:
    """Of one rank, experts evenly loaded."""
    experts = cost.experts // mesh.expert
    weights = cost.weight_size * _kept(cost.dense, experts, mesh)
    casts = cost.product_size * experts if cost.product_size != cost.weight_size else 0
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=states * weights,
        activations=cost.activations + casts,
        buffers=_rows_on_their_way(cost, mesh) + _gathered(cost, mesh),
    )


def _kept(dense: int, experts: int, mesh: MeshShape) -> int:
    """Of so many parameters outside experts and so many of a rank's own experts, those that it keeps."""
    return -(-dense // mesh.size) - (-experts // mesh.data) if mesh.shard else dense + experts


def _rows_on_their_way(cost: StepCost, mesh: MeshShape) -> int:
    """The rows of the largest layer, where they come from and where they arrive."""
    if mesh.expert == 1:
        return 0
    return max(2 * layer.rows * layer.width * max(layer.sent_size, layer.returned_size) for layer in cost.layers)


def _gathered(cost: StepCost, mesh: MeshShape) -> int:
    """Weights of a block in use and of the next, and the gradients of the one."""
    if not mesh.shard:
        return 0
    return 3 * cost.weight_size * max(unit.dense + unit.experts // mesh.expert for unit in cost.units)


# Bytes


def traffic(cost: StepCost, mesh: MeshShape, *, remote: float | None = None) -> Traffic:
    """Of one rank in one step, of ring collectives.

    `remote`: the share of the rows that goes to other ranks, where it is known; None: (expert - 1) / expert, that of
    an even load.
    """
    dense, experts = (cost.weight_size * count for count in (cost.dense, cost.experts // mesh.expert))
    share = (mesh.expert - 1) / mesh.expert if remote is None else remote
    passes = 1 if mesh.shard else 2
    return Traffic(
        dense_gradients=_ring(dense, mesh.size, passes),
        expert_gradients=_ring(experts, mesh.data, passes),
        dense_shards=_ring(dense, mesh.size, 2) if mesh.shard else 0,
        expert_shards=_ring(experts, mesh.data, 2) if mesh.shard else 0,
        rows=round(sum(2 * share * _row_bytes(layer) for layer in cost.layers)),
        counts=sum(COUNT_SIZE * layer.num_experts // mesh.expert * (mesh.expert - 1) for layer in cost.layers),
        balance=sum(2 * _ring(TOTAL_SIZE * layer.totals, mesh.size, 2) for layer in cost.layers),
    )


def _row_bytes(layer: LayerCost) -> int:
    """All rows of a layer, to the experts and back; backward sends gradients of the same types."""
    return layer.rows * layer.width * (layer.sent_size + layer.returned_size)


def _ring(size: int, ranks: int, passes: int) -> int:
    """An all-reduce is two passes, a reduce-scatter or an all-gather one."""
    return round(passes * size * (ranks - 1) / ranks)


# Time


def seconds(cost: StepCost, mesh: MeshShape, hardware: Hardware, states: int = 2) -> Seconds:
    """An estimate from data sheets: see `Hardware` for what it assumes."""
    experts = cost.experts // mesh.expert
    everyone = _Group(mesh.size, min(mesh.size, hardware.node))
    copies = _Group(mesh.data, min(mesh.data, max(1, hardware.node // mesh.expert)))
    passes = 3 if mesh.shard else 2
    rings = everyone.ring(cost.weight_size * cost.dense, passes, hardware)
    rings += copies.ring(cost.weight_size * experts, passes, hardware)
    kept = cost.weight_size * _kept(cost.dense, experts, mesh)
    return Seconds(
        compute=_compute(cost, mesh, hardware),
        rows=sum(_all_to_all(layer, mesh, hardware) for layer in cost.layers),
        dense=rings,
        update=kept * (3 + 2 * states) / (1e12 * hardware.bandwidth),
    )


def _compute(cost: StepCost, mesh: MeshShape, hardware: Hardware) -> float:
    """Products, and every operator's result written and read once; where experts have few rows each, no faster than
    their weights are read twice and the gradients written."""
    speed = 1e12 * (hardware.tflops or TFLOPS[cost.product_size])
    total = (cost.flops - sum(layer.flops for layer in cost.layers)) / speed
    total += 2 * cost.written / (1e12 * hardware.bandwidth)
    for layer in cost.layers:
        moved = 3 * cost.product_size * layer.parameters / mesh.expert
        total += max(layer.flops / speed, moved / (1e12 * hardware.bandwidth))
    return total


@dataclass(frozen=True)
class _Group:
    """Ranks that reduce together, `inside` of them in each node."""

    ranks: int
    inside: int

    def ring(self, size: int, passes: int, hardware: Hardware) -> float:
        """Passes over `size` bytes: within the nodes, and of a GPU's part of them between the nodes."""
        if self.ranks == 1:
            return 0.0
        nodes = self.ranks / self.inside
        within = (self.inside - 1) / self.inside * size / (1e9 * hardware.node_link)
        between = (nodes - 1) / nodes * size / self.inside / (1e9 * hardware.link)
        return passes * (within + between + 1e-6 * hardware.latency * math.log2(self.ranks))


def _all_to_all(layer: LayerCost, mesh: MeshShape, hardware: Hardware) -> float:
    """There and back, forward and backward: a message to every rank of the axis; both kinds of links at once."""
    if mesh.expert == 1:
        return 0.0
    inside = math.gcd(mesh.expert, hardware.node)
    sent = 2 * _row_bytes(layer) / mesh.expert
    within = (inside - 1) * sent / (1e9 * hardware.node_link)
    between = (mesh.expert - inside) * sent / (1e9 * hardware.link)
    return max(within, between) + 4 * (mesh.expert - 1) * 1e-6 * hardware.latency
