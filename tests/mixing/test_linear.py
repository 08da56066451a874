"""The oneDNN product equals `F.linear`, to second order, and steps aside outside plain eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp.mixing import linear as linear_module
from sparse_mlp.mixing.linear import Linear, Mlp, linear


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    # whoever made the processor of the tests
    monkeypatch.setattr(linear_module, "onednn_is_faster", torch.backends.mkldnn.is_available)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(40, 12), (2, 5, 6, 12), (3, 12), (0, 12)])
def test_equals_torch(shape, grad, bias, gelu):
    module = Linear(12, 7, bias=bias, gelu=gelu)
    x = torch.randn(shape, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), F.gelu(expected) if gelu else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_gradients_equal_torchs_to_second_order(columns):
    """Also of a transposed input with a transposed gradient, as token mixing has them."""
    x = torch.randn((2, 12, 32) if columns else (64, 12), requires_grad=True)
    weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((7, 12), (7,)))

    def grads(function):
        y = function(x.transpose(1, 2), weight, bias).transpose(1, 2) if columns else function(x, weight, bias)
        loss = y.sin().sum()
        first = torch.autograd.grad(loss, (x, weight, bias), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))

    for ours, theirs in zip(grads(linear), grads(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_takes_onednn_in_eager_and_steps_aside_elsewhere(monkeypatch):
    x, module = torch.randn(64, 12), Linear(12, 12)
    seen = []
    real = linear_module._fits_onednn
    monkeypatch.setattr(linear_module, "_fits_onednn", lambda *args: seen.append(real(*args)) or seen[-1])
    module(x)
    assert seen == [torch.backends.mkldnn.is_available()]
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(linear_module, "onednn_is_faster", lambda: False)
        module(x)
    module(x[:4])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    torch.func.vmap(module)(x[None])
    torch.func.jvp(lambda x: module(x), (x,), (x,))
    module.double()(x.double())
    assert seen == [False] * 6


def test_its_products_are_counted():
    with FlopCounterMode(display=False) as counter:
        Linear(12, 7)(torch.randn(2, 32, 12))
    assert counter.get_total_flops() == 2 * 64 * 12 * 7


def test_in_a_transform_of_something_else():
    """Of a part that does not depend on what is mapped or differentiated: a frozen layer, say."""
    x, module = torch.randn(64, 12), Linear(12, 12)
    whole = module(x).sum()
    torch.testing.assert_close(torch.func.vmap(lambda s: s * module(x).sum())(torch.ones(3)), whole.expand(3))
    torch.testing.assert_close(torch.func.grad(lambda s: s * module(x).sum())(torch.ones(())), whole)
    torch.testing.assert_close(
        torch.func.jvp(lambda s: s * module(x).sum(), (torch.ones(()),), (torch.ones(()),))[1], whole
    )


def test_mlp_in_pieces_is_the_same(monkeypatch):
    mlp, x = Mlp(8, 32), torch.randn(3, 5, 7, 8)
    whole = mlp(x)
    monkeypatch.setattr(linear_module, "HIDDEN_AT_ONCE", 320)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), whole, rtol=1e-5, atol=1e-6)
