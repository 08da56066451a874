"""MoeMlp against a loop per item, and everything that breaks the published systems."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_mlp.moe import MoeMlp, telemetry

FEW_AND_MANY = (40, 3000)  # items: with few rows an expert the C kernels make the products too


def make(dim: int = 16, hidden: int = 24, experts: int = 4, top_k: int = 2, **kwargs) -> MoeMlp:
    torch.manual_seed(0)
    layer = MoeMlp(dim, hidden, experts, top_k, **{"noise_std": 0.0, **kwargs})
    nn.init.normal_(layer.router.weight, std=0.5)
    nn.init.normal_(layer.experts.fc1.bias, std=0.1)
    nn.init.normal_(layer.experts.fc2.bias, std=0.1)
    return layer


def outputs_and_gradients(function, layer: MoeMlp, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = function(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weight).sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in layer.parameters()),
    ]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("dim", "items"), [(49, 30), (196, 1), (197, 3), (16, 0), (16, 100)])
def test_dropless_equals_the_loop_forward_and_all_gradients(naive_moe, dim: int, items: int, top_k: int) -> None:
    layer = make(dim, 24, 4, top_k, balance_weight=0.0).double()
    x = torch.randn(items, dim, dtype=torch.float64)
    fast = outputs_and_gradients(layer, layer, x)
    slow = outputs_and_gradients(lambda x: naive_moe(layer, x), layer, x)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 6), st.data())
def test_dropless_equals_the_loop_at_any_size(naive_moe, dim: int, items: int, experts: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    layer = make(dim, 5, experts, top_k).eval().double()
    x = torch.randn(items, dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_moe(layer, x), atol=1e-12, rtol=1e-9)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("items", FEW_AND_MANY)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_kept_graph_can_go_backward_again_and_a_spent_one_says_so(top_k: int, items: int) -> None:
    layer = make(top_k=top_k)
    x = torch.randn(items, 16, requires_grad=True)
    y = layer(x).square().sum()
    first = torch.autograd.grad(y, [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(y, [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("items", FEW_AND_MANY)
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_saved_tensors_may_be_packed_anew(noise_std: float, items: int) -> None:
    """As by hooks that offload or compress them, which keep a tensor's numbers, not its memory."""
    layer, x = make(dim=17, hidden=21, noise_std=noise_std), torch.randn(items, 17)
    torch.manual_seed(0)
    expected = outputs_and_gradients(layer, layer, x)
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), torch.clone):
        found = outputs_and_gradients(layer, layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("repeats", [5, 1000])
def test_an_item_that_is_not_finite_spoils_only_its_own_expert(repeats: int) -> None:
    """Also where experts have rows of no item, which must not be copies of another expert's item."""
    layer = make(experts=3, top_k=1, balance_weight=0.0)
    layer.router.weight.data.zero_()
    layer.router.weight.data[:, :3] = torch.eye(3)
    x = torch.eye(3, 16).repeat(repeats, 1)
    x[0, 5] = float("inf")  # the first item; it goes to expert 0
    assert layer.router(x).experts_NK.flatten().tolist() == [0, 1, 2] * repeats
    layer(x).sum().backward()
    assert not layer.experts.fc1.weight.grad[0].isfinite().all()
    assert all(parameter.grad[1:].isfinite().all() for parameter in layer.experts.parameters())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("items", FEW_AND_MANY)
def test_only_what_needs_a_gradient_gets_one(items: int) -> None:
    """Frozen experts, a frozen router, an input without a gradient: the others' gradients are those of all."""
    layer = make(balance_weight=0.0)
    x = torch.randn(items, 16)
    _, all_x, *everything = outputs_and_gradients(layer, layer, x)
    for name, parameter in layer.named_parameters():
        layer.requires_grad_(False)
        parameter.requires_grad_(True)
        layer.zero_grad()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        expected = everything[[other for other, _ in layer.named_parameters()].index(name)]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)
    layer.requires_grad_(False)
    _, only_x, *_ = outputs_and_gradients(layer, layer, x)
    layer.requires_grad_(True)
    # the router's part of the input's gradient stays: its weights are frozen, its gates are not constant
    torch.testing.assert_close(only_x, all_x, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("backend")
def test_no_items_in_float32() -> None:
    layer, x = make(), torch.randn(0, 16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 16)
    assert all(not parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("mode", ["one expert takes all", "one expert gets none"])
def test_extreme_loads(naive_moe, mode: str) -> None:
    layer = make(top_k=1, balance_weight=0.0).double()
    x = torch.rand(40, 16, dtype=torch.float64) + 0.1
    if mode == "one expert takes all":
        layer.router.weight.data[2] = 50.0
    else:
        layer.router.weight.data[2] = -50.0
    chosen = layer.router(x).experts_NK
    assert (chosen == 2).all() if mode == "one expert takes all" else not (chosen == 2).any()
    for a, b in zip(
        outputs_and_gradients(layer, layer, x),
        outputs_and_gradients(lambda x: naive_moe(layer, x), layer, x),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kwargs", [{}, {"capacity_ratio": 4.0}, {"capacity_ratio": 0.5, "prioritized": True}])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck_of_the_whole_layer(kwargs, top_k: int) -> None:
    layer = make(3, 4, 3, top_k, balance_weight=0.0, **kwargs).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a capacity that rounds is not the point here
        assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("group", ["image", "batch"])
@pytest.mark.parametrize("prioritized", [False, True])
def test_capacity_equals_dropless_when_nothing_overflows(group: str, prioritized: bool) -> None:
    dropless = make(balance_weight=0.0)
    roomy = make(balance_weight=0.0, capacity_ratio=4.0, capacity_group=group, prioritized=prioritized)
    roomy.load_state_dict(dropless.state_dict())
    x = torch.randn(3, 20, 16)
    for a, b in zip(outputs_and_gradients(roomy, roomy, x), outputs_and_gradients(dropless, dropless, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_dropped_assignments_add_zero_and_are_counted() -> None:
    layer = make(top_k=1, capacity_ratio=0.5)
    with pytest.warns(UserWarning, match="actual ratio"):
        MoeMlp(16, 8, 4, capacity_ratio=0.5)(torch.randn(3, 16))
    x = torch.randn(80, 16)
    with telemetry.record(layer) as records:
        y = layer(x)
    kept = records[""][0].kept[:, 0]
    assert 0 < kept.sum() < 80
    assert (y[~kept] == 0).all() and (y[kept] != 0).any(1).all()
    assert telemetry.collect(layer)[""].dropped.item() == pytest.approx(1 - kept.float().mean().item(), abs=1e-6)


def test_the_actual_capacity_ratio_is_warned_of_once_when_rounding_moves_it() -> None:
    layer = make(capacity_ratio=1.05, top_k=1)
    with pytest.warns(UserWarning, match=r"1\.05 over groups of 10 items rounds to 3 slots .* actual ratio is 1\.2"):
        layer(torch.randn(2, 10, 16))
    layer(torch.randn(2, 10, 16))  # warnings are errors in these tests: a second one would fail
    layer(torch.randn(1, 400, 16))  # 105 slots, exactly 1.05


def test_permuted_items_give_permuted_results() -> None:
    x, order = torch.randn(50, 16), torch.randperm(50)
    layer = make().eval()
    torch.testing.assert_close(layer(x[order]), layer(x)[order], atol=1e-6, rtol=1e-5)
    prioritized = make(eval_capacity_ratio=0.72, prioritized=True, top_k=1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(prioritized(x[order]), prioritized(x)[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{}, {"eval_capacity_ratio": 0.75}, {"eval_capacity_ratio": 1.5, "prioritized": True}]
)
def test_evaluation_is_deterministic_and_independent_of_the_batch(kwargs) -> None:
    layer = make(noise_std=1.0, **kwargs).eval()
    offsets = torch.randn(6, 1, 16)  # each image has its own, so that loads are uneven
    x = torch.randn(6, 16, 16) + offsets
    whole = layer(x)
    assert torch.equal(whole, layer(x))
    torch.testing.assert_close(layer(x[:1]), whole[:1], atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(x.flip(0)).flip(0), whole, atol=1e-6, rtol=0)


def test_experts_start_different() -> None:
    layer = MoeMlp(16, 24, 4)
    weight = layer.experts.fc1.weight
    assert all((weight[i] != weight[j]).all() for i in range(4) for j in range(i))


def test_copies_and_pickles_after_a_training_step() -> None:
    layer = make(noise_std=None)
    layer(torch.randn(20, 16)).sum().backward()
    x = torch.randn(20, 16)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))
    assert set(layer.state_dict()) == {
        "router.weight", "experts.fc1.weight", "experts.fc1.bias", "experts.fc2.weight", "experts.fc2.bias",
    }  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer = make(noise_std=None, balance_weight=0.5)
    x = torch.randn(30, 16)

    def run(function):
        torch.manual_seed(1)
        return outputs_and_gradients(function, layer, x), telemetry.collect(layer)[""].to_dict()

    plain, stats = run(layer)
    again, stats_again = run(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    assert stats == stats_again


@pytest.mark.parametrize("kwargs", [{}, {"capacity_ratio": 4.0, "eval_capacity_ratio": 4.0}])
def test_autocast_returns_what_a_linear_layer_does(kwargs) -> None:
    layer = make(**kwargs)
    x = torch.randn(20, 16)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(16, 16)(x).dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.05)
    assert layer.experts.fc1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_runs_in_other_types(dtype: torch.dtype) -> None:
    layer = make()
    x = torch.randn(20, 16)
    wanted = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    y.sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wanted, atol=0.1, rtol=0.1)


def test_any_leading_dimensions_and_strides(naive_moe) -> None:
    layer = make().eval()
    x = torch.randn(2, 3, 5, 16)
    wanted = naive_moe(layer, x)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])
    torch.testing.assert_close(layer(x[0, 0, 0]), wanted[0, 0, 0])
    strided = torch.randn(2, 16, 7).transpose(1, 2)
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), atol=0, rtol=0)
    expanded = torch.randn(1, 16).expand(9, 16).requires_grad_()
    layer(expanded).sum().backward()  # a gradient of stride 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 5}, "top_k must be at most num_experts"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"capacity_ratio": 0.0}, "capacity_ratio must be above 0"),
        ({"eval_capacity_ratio": -1.0}, "eval_capacity_ratio must be above 0"),
        ({"prioritized": True}, "prioritized=True needs a capacity_ratio"),
        ({"capacity_group": "token"}, "capacity_group must be"),
        ({"act": "rulu"}, r"act must be a name of timm's \(gelu, .*got 'rulu'"),
        ({"scores": "tanh"}, 'scores must be "softmax" or "sigmoid"'),
        ({"gate": "both"}, 'gate must be "first" or "last"'),
        ({"shared_experts": -1}, "shared_experts must not be negative"),
        ({"z_loss_weight": -1.0}, "z_loss_weight must not be negative"),
        ({"bias_rate": -1.0}, "bias_rate must not be negative"),
        ({"noise_std": -0.1}, "noise_std must not be negative"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeMlp(**{"dim": 8, "hidden_dim": 8, "num_experts": 4, **kwargs})


def test_wrong_width_names_the_shape() -> None:
    with pytest.raises(ValueError, match=r"width 16 got an input of shape \(2, 15\)"):
        make()(torch.randn(2, 15))


MODES = [{}, {"capacity_ratio": 1.5, "eval_capacity_ratio": 4.0, "prioritized": True}]


@pytest.mark.parametrize("kwargs", MODES)
def test_compiles_to_one_graph_in_training_and_evaluation(kwargs) -> None:
    layer = make(**kwargs)
    x = torch.randn(4, 20, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, layer, x), outputs_and_gradients(layer, layer, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow  # inductor compiles C++
def test_compiles_with_inductor() -> None:
    layer = make().eval()
    x = torch.randn(4, 20, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("items", [20, 2])  # two: an example with fewer assignments than slots
@pytest.mark.parametrize("kwargs", MODES)
def test_exports_with_dynamic_batch_and_every_expert(kwargs, items: int) -> None:
    layer = make(**kwargs).eval()
    example, dynamic = (torch.randn(3, items, 16),), ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(layer, example, dynamic_shapes=dynamic)
    for batch in (1, 2, 5, 64):
        x = torch.randn(batch, items, 16)
        torch.testing.assert_close(program.module()(x), layer(x), atol=1e-5, rtol=1e-4)
    for expert in range(4):  # an expert that got none of the example's items must still be there
        layer.router.weight.data.zero_()
        layer.router.weight.data[expert] = 1.0
        x = torch.rand(2, items, 16)
        again = torch.export.export(layer, example, dynamic_shapes=dynamic)
        torch.testing.assert_close(again.module()(x), layer(x), atol=1e-5, rtol=1e-4)
