"""A bias on the scores, moved against the load."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse_mlp.moe import MoeMlp

pytestmark = pytest.mark.usefixtures("backend")


def make(**kwargs) -> MoeMlp:
    torch.manual_seed(0)
    options = {"bias_rate": 0.1, "balance_weight": 0.0, "noise_std": 0.0, "scores": "sigmoid", **kwargs}
    return MoeMlp(4, 8, 4, **options)


def test_the_bias_chooses_and_the_gate_is_the_score_without_it() -> None:
    layer = make(top_k=2).eval()
    layer.router.weight.data = torch.eye(4)
    layer.router.bias.copy_(torch.tensor([0.0, 0.0, 0.5, 0.0]))
    routing = layer.router(torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
    # scores sigmoid(2, 1, 0, -1) = 0.8808, 0.7311, 0.5, 0.2689; with the bias 0.8808, 0.7311, 1.0, 0.2689
    assert routing.experts_NK.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.gates_NK, torch.tensor([[0.5, 0.8808]]), atol=1e-4, rtol=0)


def test_a_backward_moves_it_by_the_rate_against_the_load() -> None:
    layer = make()
    layer.router.weight.data = torch.eye(4)
    x = torch.eye(4)[[0, 0, 0, 1]]  # loads 3, 1, 0, 0; the mean is 1
    y = layer(x)
    assert not layer.router.bias.any(), "a forward alone moves nothing"
    y.sum().backward()
    torch.testing.assert_close(layer.router.bias, torch.tensor([-0.1, 0.0, 0.1, 0.1]))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.router.bias, torch.tensor([-0.2, 0.0, 0.2, 0.2]))
    layer.eval()(x).sum().backward()
    torch.testing.assert_close(layer.router.bias, torch.tensor([-0.2, 0.0, 0.2, 0.2]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_takes_the_same_way_and_moves_it_once(reentrant: bool) -> None:
    plain, again, x = make(), make(), torch.randn(40, 4)
    plain(x.requires_grad_()).square().sum().backward()
    checkpoint(again, x, use_reentrant=reentrant).square().sum().backward()
    assert plain.router.bias.any()
    for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.router.weight.grad, again.router.weight.grad)


def test_it_evens_the_load_without_a_loss() -> None:
    layer, x = make(bias_rate=0.02), torch.randn(400, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    layer.router.weight.data = torch.eye(4)
    layer(x)
    before = layer.meter.load.max()
    for _ in range(100):
        layer(x).sum().backward()
    assert before > 0.9
    assert layer.meter.load.max() < 0.45


def test_it_is_in_the_state_dict_and_survives_a_copy_and_the_meta_device() -> None:
    layer = make()
    layer(torch.randn(40, 4)).sum().backward()
    assert torch.equal(copy.deepcopy(layer).router.bias, layer.router.bias)
    for assign in (False, True):
        other = MoeMlp(4, 8, 4, bias_rate=0.1, device="meta")
        other = other if assign else other.to_empty(device="cpu")
        other.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(other.router.bias, layer.router.bias)


def test_it_moves_in_a_compiled_model() -> None:
    torch.compiler.reset()
    plain, x = make(), torch.randn(40, 4)
    compiled = copy.deepcopy(plain)
    plain(x).sum().backward()
    torch.compile(compiled, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(compiled.router.bias, plain.router.bias)
