"""Plans against what a step really takes, and against numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm
import torch
from tests.moe.conftest import use_backend
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp.distributed.cost import LayerCost, StepCost, UnitCost, measure
from sparse_mlp.distributed.mesh import MeshShape
from sparse_mlp.distributed.plan import GIB, Hardware, memory, meshes, plan, plans, traffic
from sparse_mlp.errors import UserError
from sparse_mlp.moe.telemetry import moe_layers


def build(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def most_allocated(run: Callable[[], object]) -> int:
    """Bytes beyond those at the start, told by torch's own allocator."""

    def totals(events: Iterable[Any]) -> Iterable[int]:
        for event in events:
            if event.name == "[memory]":
                yield event.extra_fields.total_allocated
            yield from totals(event.children)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return max(totals(profiler.profiler.kineto_results.experimental_event_tree()))  # type: ignore[union-attr]


@pytest.mark.parametrize("kwargs", [{}, {"capacity_ratio": 1.0}, {"top_k": (2, 2), "num_experts": (16, 8)}], ids=str)
def test_memory_is_that_of_a_real_step(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth: weights, gradients, AdamW's state and what forward and backward hold, on the path of a GPU."""
    use_backend("grouped", monkeypatch)
    torch.manual_seed(0)
    model, x = timm.create_model("sparse_mlp_t4_32", **kwargs), torch.randn(16, 3, 32, 32)
    held = memory(measure(build("sparse_mlp_t4_32", **kwargs), 16, 3, 32), MeshShape(1, 1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert most_allocated(lambda: model(x).sum().backward()) == pytest.approx(held.activations, rel=0.1)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    assert held.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert held.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())  # type: ignore[union-attr]
    state = sum(value.nbytes for values in optimizer.state.values() for value in values.values() if value.ndim)
    assert held.optimizer == state


@pytest.mark.slow  # a model of the published size
def test_memory_of_sparse_b_is_that_of_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend("grouped", monkeypatch)
    model, x = timm.create_model("sparse_mlp_b16_224"), torch.randn(2, 3, 224, 224)
    cost = measure(build("sparse_mlp_b16_224"), 2, 3, 224)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert most_allocated(lambda: model(x).sum().backward()) == pytest.approx(cost.activations, rel=0.1)


def test_multiply_adds_are_those_of_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend("grouped", monkeypatch)
    cost = measure(build("sparse_mlp_t4_32"), 4, 3, 32)
    with FlopCounterMode(display=False) as counter:
        timm.create_model("sparse_mlp_t4_32")(torch.randn(4, 3, 32, 32)).sum().backward()
    biases = sum(3 * 2 * layer.rows * (2 * layer.width + 128) for layer in cost.layers)  # products too, on that path
    assert cost.flops == pytest.approx(counter.get_total_flops(), abs=biases, rel=0.01)


def test_multiply_adds_of_convolutions_in_groups() -> None:
    """EfficientNet-B0 has 0.39 G for an image of 224 pixels (Tan and Le, 2019, table 1), backward twice as many."""
    cost = measure(build("efficientnet_b0"), 2, 3, 224)
    assert cost.flops / 2 == pytest.approx(2 * 3 * 0.39e9, rel=0.05)


def test_rows_and_types_of_the_layers() -> None:
    """Sparse-T/4 inside its sparse blocks: 128 tokens of 64 channels; one image has 64 channel items, K = 1, and 128
    token items, K = 2. With a capacity each expert has the same rows, used or not."""
    cost = measure(build("sparse_mlp_t4_32"), 4, 3, 32)
    assert [(layer.rows, layer.width, layer.num_experts) for layer in cost.layers] == [(256, 128, 8), (1024, 64, 4)] * 2
    assert {(layer.sent_size, layer.returned_size) for layer in cost.layers} == {(4, 4)}
    half = measure(build("sparse_mlp_t4_32"), 4, 3, 32, "bf16")
    assert {(layer.sent_size, layer.returned_size) for layer in half.layers} == {(2, 2)}
    assert half.activations < 0.8 * cost.activations and half.weight_size == 4
    limited = measure(build("sparse_mlp_t4_32", capacity_ratio=1.25), 4, 3, 32)
    assert [layer.rows for layer in limited.layers] == [4 * 8 * math.ceil(64 * 1.25 / 8), 4 * 4 * 80] * 2


def test_a_model_is_left_as_it_was() -> None:
    model = build("sparse_mlp_t4_32").eval()
    before = [layer.dispatcher for layer in moe_layers(model).values()]
    measure(model, 2, 3, 32)
    assert not model.training and [layer.dispatcher for layer in moe_layers(model).values()] == before
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())


def test_a_step_does_not_grow_with_the_number_of_experts_but_for_the_routers() -> None:
    few, many = (measure(build("sparse_mlp_t4_32", num_experts=(e, e)), 2, 3, 32) for e in (4, 512))
    assert [layer.flops for layer in few.layers] == [layer.flops for layer in many.layers]
    assert many.experts == 128 * few.experts
    routers = sum(width * (512 - 4) for width in (128, 64) * 2)
    assert many.dense - few.dense == routers


LAYER = LayerCost(
    name="moe",
    num_experts=4,
    rows=1000,
    width=10,
    sent_size=4,
    returned_size=2,
    parameters=800,
    flops=10**9,
    totals=8,
)
COST = StepCost(
    images=8,
    dense=1600,
    units=(UnitCost(100, 0), UnitCost(1500, 800)),
    layers=(LAYER,),
    activations=5000,
    written=0,
    flops=4 * 10**9,
    weight_size=4,
    product_size=4,
)


def test_bytes_by_hand() -> None:
    """1,600 weights and 800 in 4 experts, 4 bytes each, on 4 x 2 ranks: 2 experts, 1,600 bytes of them, on each."""
    sent = traffic(COST, MeshShape(4, 2))
    assert sent.dense_gradients == 2 * 6400 * 7 // 8
    assert sent.expert_gradients == 2 * 1600 * 3 // 4
    assert sent.rows == 2 * 1000 * 10 * (4 + 2) // 2, "half of the rows leave, in forward and in backward"
    assert sent.counts == 8 * 2, "two counts of 8 bytes to the one other rank"
    assert sent.balance == 2 * 2 * 8 * 4 * 7 // 8, "in both directions"
    assert (sent.dense_shards, sent.expert_shards) == (0, 0)
    assert sent.by_axis == {"all": 11200 + 112, "data": 2400, "expert": 60016}
    assert traffic(COST, MeshShape(4, 2), remote=0.25).rows == sent.rows // 2
    sharded = traffic(COST, MeshShape(4, 2, shard=True))
    assert (sharded.dense_gradients, sharded.dense_shards) == (5600, 11200)
    assert (sharded.expert_gradients, sharded.expert_shards) == (1200, 2400)
    assert (sharded.rows, sharded.counts) == (sent.rows, sent.counts)
    assert set(traffic(COST, MeshShape(1, 1)).by_axis.values()) == {0}


def test_memory_by_hand() -> None:
    held = memory(COST, MeshShape(4, 2), states=1)
    assert (held.weights, held.gradients, held.optimizer) == (4 * (1600 + 400),) * 3
    assert held.buffers == 2 * 1000 * 10 * 4
    assert held.total == 3 * 8000 + 5000 + 80000
    sharded = memory(COST, MeshShape(4, 2, shard=True))
    assert (sharded.weights, sharded.optimizer) == (4 * (200 + 100), 2 * 4 * 300)
    assert sharded.buffers == held.buffers + 3 * 4 * (1500 + 400)


def test_time_by_hand() -> None:
    """4 GFLOP at 1 TFLOP/s are 4 ms; 2 machines of 4 GPUs: a ring over 8 ranks passes 3/4 of the bytes within a machine
    and 1/2 of a quarter of them between."""
    slow = Hardware(tflops=1, bandwidth=1e3, node=4, node_link=1e-3, link=1e-4, latency=1e-9)
    found = plan(COST, MeshShape(8, 1), slow).seconds
    assert found.compute == pytest.approx(4e-3, rel=1e-3)
    size = 4 * 2400
    assert found.dense == pytest.approx(2 * size * (0.75 / 1e6 + 0.5 / 4 / 1e5), rel=1e-3)
    assert found.rows == 0
    split = plan(COST, MeshShape(4, 2), slow).seconds
    assert split.rows == pytest.approx(60000 / 1e6, rel=1e-3)
    assert split.overlapped < split.total


def test_the_best_mesh_fits_and_is_the_fastest_that_does() -> None:
    found = plans(COST, 8, Hardware())
    assert {(one.mesh.data, one.mesh.expert) for one in found} == {(8, 1), (4, 2), (2, 4)}
    assert [one.seconds.total for one in found] == sorted(one.seconds.total for one in found)
    least = min(one.memory.total for one in found)
    tight = plans(COST, 8, Hardware(memory=least / GIB))
    assert [one.fits for one in tight] == [True, *[False] * 5] and tight[0].memory.total == least
    assert [one.mesh for one in plans(COST, 1, Hardware())] == [MeshShape(1, 1)]


@pytest.mark.parametrize(
    ("ranks", "expert", "message"),
    [
        (8, 3, "8 GPUs cannot be divided into groups of 3"),
        (8, 8, "8 GPUs cannot share the 4 experts of moe"),
        (9, 3, "the 4 experts of moe cannot be divided by 3 GPUs"),
        (0, None, "0 GPUs: at least 1 is needed"),
    ],
)
def test_meshes_that_cannot_be_are_named(ranks: int, expert: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(meshes(COST, ranks, expert))


def test_a_model_without_experts() -> None:
    cost = measure(build("mixer_t4_32"), 2, 3, 32)
    assert cost.layers == () and cost.experts == 0
    assert {one.mesh.expert for one in plans(cost, 4, Hardware())} == {1}
    with pytest.raises(UserError, match="no experts that 2 GPUs could share"):
        list(meshes(cost, 4, 2))


@pytest.mark.parametrize("name", ["memory", "tflops", "node_link"])
def test_hardware_must_be_there(name: str) -> None:
    with pytest.raises(UserError, match=f"{name.replace('_', '-')} 0 must be above 0"):
        Hardware(**{name: 0})
