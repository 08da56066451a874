"""The C kernels against torch in float64, at any size; here they must be what runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.moe.conftest import use_backend
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.balance import expert_totals
from sparse_mlp.moe.experts import apply_experts
from sparse_mlp.moe.router import top_gates

at_any_size = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TINY = torch.finfo(torch.float32).tiny


@pytest.fixture(autouse=True)
def kernels_in_c(monkeypatch: pytest.MonkeyPatch):
    use_backend("C", monkeypatch)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


def both_types(function, *leaves: Tensor) -> list[list[Tensor]]:
    """Outputs and gradients of the leaves, by float32 (the kernels) and by float64 (the plain form)."""
    found = []
    for dtype in (torch.float32, torch.float64):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*own)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        found.append([y.detach(), *(leaf.grad for leaf in own)])
    return found


def assert_close(ours: list[Tensor], exact: list[Tensor], rounded: list[Tensor] | None = None) -> None:
    """`rounded` is what torch gives in float32: three times its own error is allowed besides."""
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        own = 3 * float((rounded[i].double() - b).abs().max()) if rounded and b.numel() else 0.0
        scale = max(5.0, float(b.abs().max()) if b.numel() else 0)
        torch.testing.assert_close(a.double(), b, atol=2e-5 * scale + own, rtol=1e-4)


@at_any_size
@given(
    of_expert=st.lists(st.one_of(st.integers(0, 14), st.integers(0, 300)), min_size=1, max_size=5).filter(any),
    dim=st.integers(1, 140),
    hidden_dim=st.integers(1, 300),
    threads=st.integers(1, 3),
    approximate=st.sampled_from(["none", "tanh"]),
    seed=st.integers(0, 99),
)
def test_experts(of_expert: list[int], dim: int, hidden_dim: int, threads: int, approximate: str, seed: int) -> None:
    """Few rows an expert and many; sizes that fill no tile and that do; experts without a row."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if seed % 2:
        dim, hidden_dim = 64 * max(1, dim // 64), 64 * max(1, hidden_dim // 64)
    shapes = (sum(of_expert), dim), (dim, hidden_dim), (1, hidden_dim), (hidden_dim, dim), (1, dim)
    rows, w1, b1, w2, b2 = (torch.randn(*shape) / shape[0] ** 0.5 for shape in shapes)
    w1, b1, w2, b2 = (torch.randn(len(of_expert), 1, 1) * t + 0.1 * torch.randn(t.shape) for t in (w1, b1, w2, b2))
    leaves = rows, w1, b1[:, 0], w2, b2[:, 0]
    counts = torch.tensor(of_expert)

    def loop(x: Tensor, *weights: Tensor) -> Tensor:
        parts = zip(x.split(of_expert), *weights, strict=True)
        mlps = [F.gelu(x_e @ a + b, approximate=approximate) @ c + d for x_e, a, b, c, d in parts]
        return torch.cat(mlps)

    ours, exact = both_types(lambda x, *weights: apply_experts(x, counts, *weights, approximate), *leaves)
    assert_close(ours, exact, both_types(loop, *leaves)[0])
    with torch.no_grad():
        exact = [
            F.gelu(x @ w1_e + b1_e, approximate=approximate) @ w2_e + b2_e
            for x, w1_e, b1_e, w2_e, b2_e in zip(
                leaves[0].double().split(of_expert), *(t.double() for t in leaves[1:]), strict=True
            )
        ]
        assert_close([apply_experts(leaves[0], counts, *leaves[1:], approximate)], [torch.cat(exact)])


@at_any_size
@given(
    n=st.integers(1, 40),
    num_experts=st.integers(1, 20),
    threads=st.integers(1, 3),
    noise_std=st.sampled_from([0.0, 0.3]),
    tied=st.booleans(),
    data=st.data(),
)
def test_gates_and_balance_statistics(n, num_experts, threads, noise_std, tied, data) -> None:
    torch.set_num_threads(threads)
    top_k = data.draw(st.integers(1, num_experts))
    logits = torch.randn(n, num_experts).mul(2)
    logits = logits.round() if tied else logits
    noisy = logits + noise_std * torch.randn(n, num_experts)
    chosen = [top_gates(values, top_k)[1] for values in (noisy, noisy.double())]
    assert torch.equal(*chosen)
    assert_close(*both_types(lambda noisy: top_gates(noisy, top_k)[0], noisy))
    if noise_std:
        assert_close(*both_types(lambda a, b: expert_totals(a, b, chosen[0], noise_std)[0], logits, noisy))
    else:
        assert_close(*both_types(lambda a: expert_totals(a, a, chosen[0], noise_std)[0], logits))
    entropies = [expert_totals(a, a, chosen[0], noise_std)[1] for a in (logits, logits.double())]
    torch.testing.assert_close(entropies[0].double(), entropies[1], rtol=1e-5, atol=1e-5)


def test_more_experts_than_the_kernels_take() -> None:
    logits = torch.randn(20, 1000)
    assert torch.equal(top_gates(logits, 3)[1], logits.topk(3).indices)
    layer = MoeMlp(8, 4, 1000, 2)
    layer(torch.randn(20, 8)).sum().backward()
    assert layer.router.weight.grad.isfinite().all()


def test_sums_over_more_items_than_one_block() -> None:
    logits = torch.randn(5000, 3)
    totals, entropies = expert_totals(logits, logits, top_gates(logits, 1)[1], 0.0)
    torch.testing.assert_close(totals[0], logits.softmax(-1).sum(0))
    p = logits.double().softmax(-1)
    torch.testing.assert_close(entropies.double(), -(p * p.log()).sum(), rtol=1e-5, atol=0)


def gelu_through_experts(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """GELU and its derivative of many numbers, by one expert of width and hidden width 1 with weights of 1."""
    rows = x.view(-1, 1).clone().requires_grad_()
    one, zero = x.new_ones(1, 1, 1), x.new_zeros(1, 1)
    y = apply_experts(rows, torch.tensor([len(rows)]), one, zero, one, zero, approximate)
    y.backward(torch.ones_like(y))
    assert rows.grad is not None
    return y.detach().flatten(), rows.grad.flatten()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_about_as_exact_as_torchs(approximate: str) -> None:
    """Over all the numbers where it bends; at the ends of float32 it is the identity and zero."""
    x = torch.linspace(-12, 12, 100_001)
    theirs, exact = [], []
    for found, dtype in ((exact, torch.float64), (theirs, torch.float32)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        found.append(F.gelu(leaf, approximate=approximate))
        found[0].sum().backward()
        found.append(leaf.grad)
    for ours, other, right in zip(gelu_through_experts(x, approximate), theirs, exact, strict=True):
        assert (ours - right).abs().max() <= 2 * (other - right).abs().max()
    ends = torch.tensor([1e15, -1e15, 1e4, -1e4, float("nan"), 0.0, -0.0])
    for one, value, slope in zip(
        ends, (1e15, 0, 1e4, 0, float("nan"), 0, 0), (1, 0, 1, 0, float("nan"), 0.5, 0.5), strict=True
    ):
        y, dy = gelu_through_experts(one.view(1), approximate)
        torch.testing.assert_close(y, torch.tensor([float(value)]), equal_nan=True)
        torch.testing.assert_close(dy, torch.tensor([float(slope)]), equal_nan=True)


def test_far_from_where_they_bend_slopes_are_zero_and_not_subnormal() -> None:
    """A subnormal number, below float32's tiny, costs a processor a hundred cycles; all of them were such."""
    y, slope = gelu_through_experts(torch.linspace(-40, -5, 5001), "none")
    # of the load of two experts, up to 64 standard deviations from the threshold
    logits = (torch.linspace(0.1, 4, 200).view(-1, 1) * torch.tensor([[1.0, -1.0]])).requires_grad_()
    totals, _ = expert_totals(logits, logits.detach().clone(), top_gates(logits.detach(), 1)[1], 0.125)
    (grad,) = torch.autograd.grad(totals[1, 1], logits)
    for found in (slope, grad):
        assert found.abs().max() > 1e-7
        assert found.abs().min() == 0
    for found in (y, slope, grad):
        assert found[found != 0].abs().min() >= TINY


@pytest.mark.parametrize("threads", [1, 3])  # which three are from 3,000 items on: below, one does the work
@pytest.mark.parametrize("items", [3, 20, 100, 3000], ids="{} items".format)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_layer(items: int, top_k: int, threads: int) -> None:
    """Forward without gradients, forward with, and all gradients."""
    torch.set_num_threads(threads)
    layer, x = MoeMlp(49, 70, 4, top_k, noise_std=0.0), torch.randn(items, 49)
    results = []
    for dtype in (torch.float32, torch.float64):
        layer, x = layer.to(dtype).train(), x.detach().to(dtype).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        gradients = [x.grad, *(p.grad for p in layer.parameters())]
        with torch.no_grad():
            results.append([y.detach(), layer(x), layer.eval()(x), *gradients])
    assert_close(*results)


def test_the_same_threads_give_the_same_bits() -> None:
    torch.set_num_threads(2)
    layer = MoeMlp(96, 384, 4).eval()
    x = torch.randn(700, 96)
    with torch.no_grad():
        for items in (700, 20):
            assert all(torch.equal(layer(x[:items]), layer(x[:items])) for _ in range(5))
    gradients = [torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())) for _ in range(5)]
    assert all(torch.equal(a, b) for other in gradients for a, b in zip(other, gradients[0], strict=True))


@pytest.mark.parametrize("items", [20, 3000])
def test_what_is_made_on_the_way_does_not_follow_torchs_defaults(items: int) -> None:
    """A kernel would read numbers of another type, or on another device, as if they were its own."""
    layer, x = MoeMlp(16, 24, 4, top_k=2), torch.randn(items, 16)
    found = []
    for default in (None, "dtype", "device"):
        try:
            torch.set_default_dtype(torch.float64 if default == "dtype" else torch.float32)
            torch.set_default_device("meta" if default == "device" else None)
            torch.manual_seed(0)
            with torch.no_grad():
                found.append([layer.train()(x), layer.eval()(x)])
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("items", [20, 3000])
def test_multiply_adds_are_counted(items: int) -> None:
    """Of the router N E D; of the experts 2 N K D H forward, and twice that backward."""
    layer, x = MoeMlp(16, 24, 4, top_k=2), torch.randn(items, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    router, experts = items * 4 * 16, 2 * items * 2 * 16 * 24
    assert forward.get_total_flops() == 2 * (router + experts)
    assert backward.get_total_flops() == 2 * 2 * (router + experts)


def test_operators_pass_torchs_own_check() -> None:
    """Schema and fake form."""
    logits, experts = torch.randn(9, 4), torch.randint(4, (9, 2))
    rows, weights = (
        torch.randn(18, 5),
        (torch.randn(4, 5, 6), torch.randn(4, 6), torch.randn(4, 6, 5), torch.randn(4, 5)),
    )
    calls = {
        "top_gates": (logits, 2),
        "expert_totals": (logits, logits + 1, experts, 0.5),
        "sort_by_expert": (experts, 4),
        "gather": (rows, experts.flatten()),
        "combine": (rows, torch.arange(18).view(9, 2), torch.rand(9, 2)),
        "experts": (rows, torch.tensor([4, 0, 8, 6]), *weights, "none", True),
        "grouped_product": (rows, weights[0], torch.tensor([4, 4, 12, 18], dtype=torch.int32)),
        "grouped_outer": (rows, torch.randn(18, 3), torch.tensor([4, 4, 12, 18], dtype=torch.int32)),
    }
    for name, args in calls.items():
        operator = getattr(torch.ops.sparse_mlp, name).default
        torch.library.opcheck(operator, args, test_utils=("test_schema",))
        expected = operator(*args)
        meta = operator(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
        for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (expected, meta)), strict=True):
            if name != "experts":  # whose rows have a stride of whole tiles
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
