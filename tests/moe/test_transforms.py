"""torch.func, higher derivatives, tracing, meta and fake tensors: right, whatever backend serves plain calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from tests.moe.conftest import use_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_mlp.moe import MoeMlp, collect_balance_loss, telemetry

MODES = [{}, {"capacity_ratio": 3.0, "eval_capacity_ratio": 3.0, "capacity_group": "batch"}]


@pytest.fixture(autouse=True)
def every_backend(backend: str) -> str:
    return backend


def make(dtype: torch.dtype = torch.float64, *, top_k: int = 2, **kwargs) -> MoeMlp:
    torch.manual_seed(0)
    layer = MoeMlp(5, 7, 3, top_k, **{"noise_std": 0.0, **kwargs})
    nn.init.normal_(layer.router.weight, std=0.7)
    return layer.to(dtype).eval()


def as_function(layer: MoeMlp) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return lambda parameters, x: torch.func.functional_call(layer, parameters, (x,)), parameters


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_gradient_penalty_has_the_gradient_of_finite_differences(kwargs, top_k: int) -> None:
    layer, x = make(top_k=top_k, **kwargs), torch.randn(6, 5, dtype=torch.float64)

    def penalty() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        return grad.square().sum()

    penalty().backward()
    for parameter in layer.parameters():
        for index in ((0,) * parameter.ndim, (-1,) * parameter.ndim):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[index] += step
                ends.append(penalty().item())
                with torch.no_grad():
                    parameter[index] -= step
            assert parameter.grad is not None
            assert parameter.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("items", [6, 2000])
@pytest.mark.parametrize("kwargs", MODES)
def test_a_gradient_penalty_in_float32_is_that_in_float64(kwargs, items: int) -> None:
    """The operators too have second derivatives, those of what they stand for."""
    x, found = torch.randn(items, 5, dtype=torch.float64), []
    for dtype in (torch.float32, torch.float64):
        layer, leaf = make(dtype, **kwargs), x.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        found.append([leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5 * float(double.abs().max()))


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_gives_what_autograd_gives(kwargs, dtype: torch.dtype) -> None:
    layer, x = make(dtype, **kwargs), torch.randn(6, 5, dtype=dtype)
    function, parameters = as_function(layer)
    loss = lambda parameters, x: function(parameters, x).square().sum()  # noqa: E731
    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    torch.testing.assert_close(grad_x, leaf.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)
    # a gradient with respect to the experts only: the router then sees no transformed tensor
    part = {name: value for name, value in parameters.items() if "experts" in name}
    for name, grad in torch.func.grad(lambda part: loss(part, x))(part).items():
        torch.testing.assert_close(grad, grads[name])
    tangent = torch.randn_like(x)
    y, moved = torch.func.jvp(lambda x: function(parameters, x), (x,), (tangent,))
    torch.testing.assert_close(y, layer(x))
    jacobian = torch.func.jacrev(lambda x: function(parameters, x))(x)
    torch.testing.assert_close(moved, torch.einsum("abcd,cd->ab", jacobian, tangent))
    torch.testing.assert_close(torch.func.jacfwd(lambda x: function(parameters, x))(x), jacobian)
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda x: layer(x), x, vectorize=True), jacobian)


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap_over_inputs_and_over_models(kwargs, dtype: torch.dtype) -> None:
    layers = [make(dtype, **kwargs) for _ in range(3)]
    for layer in layers[1:]:
        layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    x = torch.randn(3, 4, 5, dtype=dtype)
    torch.testing.assert_close(torch.vmap(layers[0])(x), torch.stack([layers[0](one) for one in x]))
    function, _ = as_function(layers[0])
    stacked, _ = torch.func.stack_module_state(layers)
    stacked = {name: value.detach() for name, value in stacked.items()}
    found = torch.vmap(function)(stacked, x)
    torch.testing.assert_close(found, torch.stack([layer(one) for layer, one in zip(layers, x, strict=True)]))
    per_sample = torch.vmap(torch.func.grad(lambda x: layers[0](x).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    torch.stack([layers[0](one) for one in leaf]).square().sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_in_training_has_the_balance_loss_too(dtype: torch.dtype) -> None:
    layer = make(dtype, balance_weight=0.5).train()
    x = torch.randn(6, 5, dtype=dtype)
    _, parameters = as_function(layer)
    buffers = dict(layer.named_buffers())
    grads = torch.func.grad(
        lambda parameters: torch.func.functional_call(layer, {**parameters, **copy.deepcopy(buffers)}, (x,)).sum()
    )(parameters)
    layer.zero_grad()
    layer(x).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_per_sample_and_tangents_in_training(kwargs, dtype: torch.dtype) -> None:
    """The balance loss of each sample by itself; the meters, which hold one forward, are left alone."""
    layer, x = make(dtype, balance_weight=0.5, **kwargs).train(), torch.randn(3, 4, 5, dtype=dtype)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    before = telemetry.collect(layer)[""].to_dict()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x[0],), (x[0],))
    assert telemetry.collect(layer)[""].to_dict() == before
    for i, one in enumerate(x):
        layer.zero_grad()
        leaf = one.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad)
        if i == 0:  # forward mode follows the output, which the balance loss leaves as it is
            layer.eval()
            leaf = one.clone().requires_grad_()
            (grad,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
            torch.testing.assert_close(tangent, (grad * one).sum())
            layer.train()


@pytest.mark.parametrize("kwargs", MODES)
def test_a_traced_layer_routes_other_items_elsewhere(kwargs) -> None:
    layer = make(torch.float32, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and wary of shapes
        traced = torch.jit.trace(layer, torch.randn(8, 5), check_trace=False)
    for _ in range(3):
        x = 3 * torch.randn(8, 5)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("items", [8, 600])
def test_shapes_without_numbers(kwargs, training: bool, items: int) -> None:
    """On the meta device, as timm's own tests run every model, and with fake tensors."""
    meta = MoeMlp(5, 7, 3, 2, device="meta", **kwargs).train(training)
    x = torch.empty(items, 5, device="meta", requires_grad=True)
    y = meta(x)
    y.sum().backward()
    assert (y.shape, y.device.type, x.grad.shape) == (x.shape, "meta", x.shape)
    layer = MoeMlp(5, 7, 3, 2, **kwargs).train(training)
    with FakeTensorMode() as mode:  # torch's own initialisers fail in it
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        x = torch.empty(items, 5, requires_grad=True)
        y = torch.func.functional_call(layer, fake, (x,))
        y.sum().backward()
    assert y.shape == x.grad.shape == (items, 5)


@pytest.mark.parametrize("way", ["to_empty, reset", "to_empty, init", "to_empty, assign", "to_empty, copy", "assign"])
def test_what_no_checkpoint_holds_is_right_after_the_meta_device(way: str) -> None:
    x, weights = torch.randn(6, 5), MoeMlp(5, 7, 3, 2).state_dict()
    layer = nn.Sequential(MoeMlp(5, 7, 3, 2, device="meta"))
    if "to_empty" in way:
        layer.to_empty(device="cpu")
        for buffer in layer.buffers():
            assert not buffer.isnan().any()
    if "reset" in way:
        layer[0].reset_parameters()
    elif "init" in way:
        layer[0].init_weights()
        layer[0].init_non_persistent_buffers()
    else:
        weights = {f"0.{name}": value for name, value in weights.items()}
        layer.load_state_dict(weights, assign="assign" in way)
    assert layer[0].balance_scale.item() == 1
    stats = telemetry.collect(layer)["0"].to_dict()
    assert stats["load"] == [0.0] * 3 and stats["balance_loss"] == 0
    layer.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_loading_weights_leaves_the_scale_that_was_set() -> None:
    layer = MoeMlp(5, 7, 3)
    layer.balance_scale.fill_(0.25)
    layer.load_state_dict(layer.state_dict())
    layer.to(torch.float64)
    assert layer.balance_scale.item() == 0.25


def test_compiled_in_training_with_the_balance_loss_collected() -> None:
    layer, x = make(torch.float32, balance_weight=0.5).train(), torch.randn(6, 5)
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        with collect_balance_loss(layer) as losses:
            y = function(x)
        (y.sum() + sum(losses)).backward()
        found.append([parameter.grad.clone() for parameter in layer.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(16, 32), (49, 70), (197, 196)])
@pytest.mark.parametrize("mode", ["even", "one expert takes all", "an expert gets none"])
def test_grouped_products_are_the_plain_form(
    dtype: torch.dtype, widths: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths that grouped_mm refuses, gradients of stride 0 and transposed items among them."""
    layer = MoeMlp(*widths, 4, 2 if mode == "even" else 1, noise_std=0.0, balance_weight=0.0).to(dtype)
    x = torch.rand(widths[0], 30).t().to(dtype)
    if mode != "even":
        nn.init.zeros_(layer.router.weight)
        layer.router.weight.data[2] = 1.0 if mode == "one expert takes all" else -1.0
    found = []
    for name in ("grouped", "plain"):
        use_backend(name, monkeypatch)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        found.append([y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


def test_in_a_transform_of_something_else() -> None:
    """The layer's part does not depend on what is mapped: frozen, say."""
    layer, x = make(torch.float32), torch.randn(6, 5)
    whole = layer(x).sum().detach()
    mapped = torch.func.vmap(lambda scale: scale * layer(x).sum())(torch.ones(3))
    torch.testing.assert_close(mapped.detach(), whole.expand(3))
