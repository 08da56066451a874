"""Where other systems of mixtures of experts break: ours does not. One test a trap, named after who falls into it.

Traps that have their test in another file are not repeated here.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn

from sparse_mlp.moe import MoeMlp, telemetry

CAPACITY = {"capacity_ratio": 1.0, "eval_capacity_ratio": 1.0}


def skewed(images: int = 6, items: int = 49, dim: int = 16) -> torch.Tensor:
    """Images with an offset each, so that routing is skewed: what makes others' results depend on the batch."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, items, dim, generator=generator) + 2 * torch.randn(images, 1, dim, generator=generator)


def make(*, top_k: int = 1, dim: int = 16, experts: int = 4, spread: float = 0.5, **kwargs) -> MoeMlp:
    torch.manual_seed(1)
    layer = MoeMlp(dim, 32, experts, top_k, **kwargs)
    nn.init.normal_(layer.router.weight, std=spread)  # a router that has learned to choose
    return layer


def quiet(layer: MoeMlp, x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # capacities round
        return layer(x)


@pytest.mark.parametrize("kwargs", [{}, CAPACITY, {**CAPACITY, "prioritized": True}])
@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_ignores_order_and_company(top_k: int, kwargs) -> None:
    """st-moe, mixture-of-experts, DeepSpeed (drop) and Tutel (capacity): batch mates or their order change a result."""
    layer, x = make(top_k=top_k, **kwargs).eval(), skewed()
    y = quiet(layer, x)
    assert torch.equal(quiet(layer, x), y), "twice the same"
    torch.testing.assert_close(quiet(layer, x.flip(0)), y.flip(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(quiet(layer, x[:1]), y[:1], atol=1e-6, rtol=1e-6)


def test_no_item_is_lost_in_evaluation() -> None:
    """HF Switch gives 39 % zero rows on such input, mixture-of-experts 12 %, DeepSpeed 10.5 %."""
    layer = make(capacity_ratio=1.0).eval()  # a capacity in training, none in evaluation
    assert (layer(skewed()).abs().sum(-1) > 0).all()


def test_late_items_are_not_the_ones_dropped_when_prioritized() -> None:
    """HF Switch drops by position, so that the lower right of every image suffers."""
    layer = make(capacity_ratio=0.5, prioritized=True, noise_std=0.0).train()
    records: list[telemetry.RoutingRecord] = []
    layer.on_routing = records.append
    quiet(layer, skewed(images=64))
    kept, gates = records[0].kept.squeeze(-1), records[0].gates.squeeze(-1)
    first, second = kept[:, :24].float().mean(), kept[:, 25:].float().mean()
    assert abs(first - second) < 0.1
    assert gates[kept].mean() > gates[~kept].mean() + 0.05, "the least certain ones go"


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_differ_so_that_the_task_reaches_the_router(top_k: int) -> None:
    """DeepSpeed copies one expert E times (router gradient about 1e-10 at K = 2); Mixtral's gates are 1 at K = 1."""
    torch.manual_seed(0)
    layer = MoeMlp(16, 32, 4, top_k, balance_weight=0.0).eval()
    first, *others = layer.experts.fc1.weight.unbind(0)
    assert all((first - other).abs().max() > 1e-3 for other in others)
    layer(torch.randn(32, 16)).square().sum().backward()
    gradient = layer.router.weight.grad
    assert gradient is not None and gradient.norm() > 1e-3


def test_no_tensor_with_a_graph_stays_on_the_module() -> None:
    """DeepSpeed's and Tutel's l_aux: deepcopy, an EMA and pickle fail after a training step."""
    layer = make().train()
    layer(skewed()).sum().backward()
    for module in layer.modules():
        kept = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        assert all(value.grad_fn is None for value in [*kept, *module._buffers.values()] if value is not None)
    assert torch.equal(copy.deepcopy(layer).router.weight, layer.router.weight)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).router.weight, layer.router.weight)
    average = ModelEmaV3(layer, decay=0.5)
    layer(skewed()).sum().backward()
    average.update(layer)


def test_nothing_accumulates_in_globals() -> None:
    """megablocks keeps its losses in module-level lists that grow until the user clears them."""
    layer = make().train()

    def containers() -> dict[str, int]:
        modules = [(name, module) for name, module in sys.modules.items() if name.startswith("sparse_mlp.")]
        held = [(f"{name}.{key}", value) for name, module in modules for key, value in vars(module).items()]
        return {name: len(value) for name, value in held if isinstance(value, list | dict | set)}

    layer(skewed()).sum().backward()
    before = containers()
    for _ in range(3):
        layer(skewed()).sum().backward()
    assert containers() == before


@pytest.mark.parametrize("kwargs", [{}, CAPACITY])
@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (0, 49, 16), (3, 0, 16), (2, 3, 5, 16)])
def test_single_none_and_many_dimensions(shape: tuple[int, ...], kwargs) -> None:
    """DeepSpeed refuses N below its least capacity, mixture-of-experts an empty batch, Mixtral a 4-D input."""
    for layer in (make(**kwargs).eval(), make(**kwargs).train()):
        x = torch.randn(shape, requires_grad=True)
        y = quiet(layer, x)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [49, 196, 197])
def test_widths_that_are_no_multiple_of_sixteen_bytes(dim: int, dtype: torch.dtype) -> None:
    """F.grouped_mm, and with it transformers and torchtitan: 49 and 197 fail in every type, 196 in half precision."""
    layer = make(dim=dim, top_k=2).to(dtype).train()
    x = torch.randn(10, dim, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()  # an expanded gradient, of stride 0: "Invalid strides" there
    assert y.dtype == dtype and x.grad is not None and x.grad.isfinite().all()


def test_rows_without_an_expert_are_zero_not_what_the_memory_held() -> None:
    """F.grouped_mm leaves rows behind the last offset as they were."""
    layer = make(**{**CAPACITY, "eval_capacity_ratio": 0.25}).eval()
    records: list[telemetry.RoutingRecord] = []
    layer.on_routing = records.append
    x = skewed()
    y = quiet(layer, x)
    dropped = ~records[0].kept.squeeze(-1)
    assert dropped.any() and (y[dropped] == 0).all() and (y[~dropped].abs().sum(-1) > 0).all()


def test_autocast_is_not_ignored() -> None:
    """F.grouped_mm returns float32 under autocast (pytorch 174763)."""
    layer, x = make().eval(), skewed()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == F.linear(x, torch.zeros(1, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("top_k", [1, 2])
def test_exported_without_moving_parameters_and_with_every_expert(top_k: int) -> None:
    """soft-moe and HF Switch call `.to` on parameters in forward; others leave idle experts out of the graph."""
    layer = make(top_k=top_k).eval()
    nn.init.zeros_(layer.router.weight)
    with torch.no_grad():
        layer.router.weight[0] = 1.0  # the example uses expert 0 (and 1) alone
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.ones(3, 20, 16),), dynamic_shapes=({0: batch},))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    restored = torch.export.load(stored).module()
    x = skewed(images=7)[:, :20]
    torch.testing.assert_close(restored(x), layer(x), atol=1e-5, rtol=1e-5)
    x = -x  # where the others are chosen
    torch.testing.assert_close(restored(x), layer(x), atol=1e-5, rtol=1e-5)


def test_dropped_share_is_told() -> None:
    """Nobody reports it. By hand: 8 items of one image, all for expert 0 of 4, ratio 1: 2 slots, 6 dropped."""
    layer = make(capacity_ratio=1.0, noise_std=0.0).train()
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1.0
    layer(torch.ones(1, 8, 16))
    stats = telemetry.collect(layer)[""]
    assert stats.to_dict()["dropped"] == pytest.approx(6 / 8)
    assert stats.to_dict()["load"] == [1.0, 0.0, 0.0, 0.0]


def test_recomputed_activations_do_not_count_twice() -> None:
    """torchtitan's counts double under activation checkpointing and are halved again by a hack."""
    plain, recomputed = make().train(), make().train()
    x = skewed()
    torch.manual_seed(0)
    plain(x).sum().backward()
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(recomputed, x, use_reentrant=False)
    y.sum().backward()
    assert telemetry.collect(plain)[""].to_dict() == telemetry.collect(recomputed)[""].to_dict()
    torch.testing.assert_close(plain.router.weight.grad, recomputed.router.weight.grad)


def test_no_unused_parameter_where_an_expert_gets_nothing() -> None:
    """Experts in a ModuleList have no gradient then, and DistributedDataParallel stops."""
    layer = make(balance_weight=0.0).train()
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1.0
    layer(torch.ones(8, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert not [module for module in layer.modules() if isinstance(module, nn.ModuleList)]


def test_capacity_is_never_below_a_slot() -> None:
    """A capacity of zero slots would drop everything without a word."""
    layer = make(experts=8, **CAPACITY).eval()
    with pytest.warns(UserWarning, match="actual ratio is 8"):
        y = layer(torch.randn(1, 1, 16))
    assert y.abs().sum() > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_capacity_drops_what_overflows_and_nothing_else(items: int, experts: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    ratio = data.draw(st.sampled_from([0.3, 1.0, 1.5, 9.0]))
    dropless = make(top_k=top_k, experts=experts).eval()
    limited = make(top_k=top_k, experts=experts, capacity_ratio=ratio, eval_capacity_ratio=ratio).eval()
    records: list[telemetry.RoutingRecord] = []
    limited.on_routing = records.append
    x = torch.randn(1, items, 16)
    y = quiet(limited, x)
    whole = records[0].kept.all(-1)
    torch.testing.assert_close(y[whole], dropless(x)[whole], atol=1e-6, rtol=1e-5)
    slots = -(-items * top_k * int(ratio * 10) // (10 * experts))
    chosen = records[0].experts[records[0].kept]
    counts = chosen.bincount(minlength=experts) if len(chosen) else torch.zeros(experts)
    wanted = records[0].experts.flatten().bincount(minlength=experts)
    assert torch.equal(counts.long(), wanted.clamp(max=slots))


def test_forward_takes_the_items_alone() -> None:
    """No mask, no batch size, no loss comes along: the layer goes where an MLP went."""
    assert list(inspect.signature(MoeMlp.forward).parameters) == ["self", "x"]
    assert isinstance(make().eval()(skewed()), torch.Tensor)
