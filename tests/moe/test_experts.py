"""The experts as a module that others see and replace: hooks, adapters, shards, FSDP."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_mlp.moe import MoeMlp, dispatch
from sparse_mlp.moe.experts import Experts

pytestmark = pytest.mark.usefixtures("backend")


def make(**kwargs) -> MoeMlp:
    torch.manual_seed(0)
    layer = MoeMlp(16, 24, 6, 2, **{"noise_std": 0.0, **kwargs})
    nn.init.normal_(layer.router.weight)
    return layer


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], None])
def test_rows_and_counts_in_rows_out(counts: list[int] | None) -> None:
    torch.manual_seed(0)
    experts = Experts(5, 7, 3)
    rows = torch.randn(9 if counts is None else 7, 5)
    y = experts(rows, None if counts is None else torch.tensor(counts))
    parts = []
    for e, x in enumerate(rows.split([3, 3, 3] if counts is None else counts)):
        hidden = nn.functional.gelu(x @ experts.fc1.weight[e] + experts.fc1.bias[e])
        parts.append(hidden @ experts.fc2.weight[e] + experts.fc2.bias[e])
    torch.testing.assert_close(y, torch.cat(parts))


class TwoShards(nn.Module):
    """Each half of the experts apart, as on two machines; rows go there and come back."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        num_experts, dim, hidden_dim = experts.fc1.weight.shape
        self.shards = nn.ModuleList(Experts(dim, hidden_dim, num_experts // 2) for _ in range(2))
        with torch.no_grad():
            for name, whole in experts.named_parameters():
                for shard, part in zip(self.shards, whole.chunk(2), strict=True):
                    shard.get_parameter(name).copy_(part)

    def forward(self, items_ND: Tensor, gates_NK: Tensor, plan: dispatch.Plan, experts: dispatch.Experts) -> Tensor:
        rows_MD = dispatch.gather(items_ND, plan.item_M, plan.row_NK)
        if plan.counts_E is None:
            sent = [(part, None) for part in rows_MD.chunk(2)]
        else:
            halves = plan.counts_E.chunk(2)
            parts = rows_MD.split([int(half.sum()) for half in halves])
            sent = list(zip(parts, halves, strict=True))
        returned = [shard(rows, counts) for shard, (rows, counts) in zip(self.shards, sent, strict=True)]
        return dispatch.combine(torch.cat(returned), plan.row_NK, gates_NK)


@pytest.mark.parametrize("kwargs", [{}, {"capacity_ratio": 1.0, "capacity_group": "batch"}])
def test_a_dispatcher_that_sends_rows_to_two_shards_and_back(kwargs) -> None:
    whole = make(**kwargs)
    sharded = copy.deepcopy(whole)
    sharded.dispatcher = TwoShards(whole.experts)
    x = torch.randn(60, 16)
    found = []
    for layer in (whole, sharded):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, layer.router.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, parameter in whole.experts.named_parameters():
        parts = [shard.get_parameter(name).grad for shard in sharded.dispatcher.shards]
        torch.testing.assert_close(torch.cat(parts), parameter.grad, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in sharded.experts.parameters())


def test_hooks_see_every_module_with_a_weight() -> None:
    layer, seen = make(), []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(torch.randn(10, 16))
    owners = {name.rsplit(".", 1)[0] for name, _ in layer.named_parameters()}
    assert owners | {"experts", ""} <= set(seen)


class LowRank(nn.Module):
    """An adapter of a stacked weight, as peft's `target_parameters` makes it."""

    def __init__(self, shape: torch.Size, rank: int = 2) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(shape[0], shape[1], rank)),
            nn.Parameter(torch.zeros(shape[0], rank, shape[2])),
        )

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


def test_an_adapter_on_the_stacked_weights_trains() -> None:
    layer, x = make(balance_weight=0.0), torch.randn(40, 16)
    before = layer(x).detach()
    layer.requires_grad_(False)
    for linear in (layer.experts.fc1, layer.experts.fc2):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight.shape))
    torch.testing.assert_close(layer(x).detach(), before)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(10):
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_adapter_that_is_there_only_while_its_module_is_called_trains() -> None:
    """peft adds its part in the module's forward hook and takes it away afterwards."""
    layer, x = make(balance_weight=0.0), torch.randn(40, 16)
    layer.requires_grad_(False)
    linear = layer.experts.fc1
    delta = LowRank(linear.weight.shape)
    real = linear.forward

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        parametrize.register_parametrization(linear, "weight", delta)
        try:
            return real(*args)
        finally:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)

    linear.forward = call
    layer(x).square().mean().backward()
    assert delta.b.grad is not None and delta.b.grad.abs().max() > 0


@pytest.mark.slow  # starts processes
def test_fully_sharded(launch, tmp_path: Path) -> None:
    errors: list[str] = []
    program = Path(__file__).with_name("fully_sharded.py")
    assert launch(program, {}, ranks=2, errors=errors) == [0, 0], errors
