"""The C kernels against torch: the same numbers, whatever the sizes."""

import ctypes
import logging
import platform
import stat
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mlp.moe import MoeMlp, balance, compiled, dispatch, rows, telemetry
from sparse_mlp.moe.experts import _FewRowsExperts, _SortedExperts
from sparse_mlp.moe.router import NoisyTopKRouter

needs_kernels = pytest.mark.skipif(compiled.state() != "compiled", reason=f"C kernels: {compiled.state()}")
sizes = {"n": st.integers(1, 40), "d": st.integers(1, 70), "threads": st.integers(1, 3)}


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


def test_here_the_kernels_are_compiled() -> None:
    """Where there is a C compiler; elsewhere it is said that there is none."""
    here = "compiled" if sys.platform == "linux" and compiled._compiler() else "no C compiler"
    assert compiled.state().startswith((here, "compiled on Linux only", "switched off"))


@needs_kernels
@given(**sizes, k=st.integers(1, 3))
@settings(deadline=None)
def test_combine_is_the_sum_of_an_items_rows(n: int, d: int, threads: int, k: int) -> None:
    """Plain, and gated with the bias of each row's expert."""
    torch.set_num_threads(threads)
    from_PD, row_NK = torch.randn(n * k, d + 3)[:, :d], torch.randperm(n * k).view(n, k)
    gates_NK, experts_NK, bias_ED = torch.rand(k, n).t(), torch.randint(5, (n, k)), torch.randn(5, d)
    plain = from_PD[row_NK].sum(1)
    gated = (gates_NK[..., None] * (from_PD[row_NK] + bias_ED[experts_NK])).sum(1)
    for ops in (rows, compiled):
        torch.testing.assert_close(ops.combine(from_PD, row_NK), plain, atol=1e-5, rtol=1e-5)
        found = ops.combine_gated(from_PD, row_NK, gates_NK, experts_NK, bias_ED)
        torch.testing.assert_close(found, gated, atol=1e-5, rtol=1e-5)


@needs_kernels
@given(**sizes, approximate=st.sampled_from(["none", "tanh"]))
@settings(deadline=None)
def test_gelu_and_its_backward_are_those_of_autograd(n: int, d: int, threads: int, approximate: str) -> None:
    torch.set_num_threads(threads)
    hidden, bias, grad = torch.randn(n, d) * 3, torch.randn(d), torch.randn(n, d)
    leaf, bias_leaf = (t.double().requires_grad_() for t in (hidden, bias))
    expected = F.gelu(leaf + bias_leaf, approximate=approximate)
    expected.backward(grad.double())
    for ops in (rows, compiled):
        act, again, slope, bias_grad = torch.empty(n, d), torch.empty(n, d), grad.clone(), torch.empty(d)
        assert ops.gelu(hidden, bias, approximate, act) is act
        ops.gelu_backward(hidden, bias, approximate, slope, again, bias_grad)
        assert torch.equal(act, again)
        # torch's own derivative of the tanh form is off by 1e-6, times a gradient of up to 5, summed for the bias
        for got, wanted, atol in ((act, expected, 3e-6), (slope, leaf.grad, 1e-5), (bias_grad, bias_leaf.grad, 1e-4)):
            torch.testing.assert_close(got.double(), wanted.detach(), atol=atol, rtol=1e-5)


@needs_kernels
@given(**sizes)
@settings(deadline=None)
def test_gradients_through_the_gated_sum_are_those_of_autograd(n: int, d: int, threads: int) -> None:
    torch.set_num_threads(threads)
    items = n + 3
    item_P, gate_P, out_PD, grad_ND = (
        torch.randint(items, (n,)),
        torch.rand(n),
        torch.randn(n, d),
        torch.randn(d, items).t(),
    )
    bias_D = torch.randn(d, requires_grad=True)
    leaf, gate_leaf = out_PD.clone().requires_grad_(), gate_P.clone().requires_grad_()
    y_ND = torch.zeros(items, d).index_add(0, item_P, gate_leaf[:, None] * (leaf + bias_D))
    y_ND.backward(grad_ND)
    for ops in (rows, compiled):
        dout, dgate, dbias = torch.empty(n, d), torch.empty(n), torch.empty(d)
        ops.gather_gated(grad_ND, item_P, gate_P, out_PD, bias_D.detach(), dout, dgate, dbias)
        for got, wanted in ((dout, leaf.grad), (dgate, gate_leaf.grad), (dbias, bias_D.grad)):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(ops.gather(grad_ND, item_P, dout), grad_ND[item_P])


@needs_kernels
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_about_as_exact_as_torchs(approximate: str) -> None:
    """Over all the numbers where it bends; at the ends of float32 it is the identity and zero."""
    x = torch.linspace(-12, 12, 100_001).view(1, -1)
    zero = torch.zeros(x.shape[1])
    act, slope, again, room = torch.empty_like(x), torch.ones_like(x), torch.empty_like(x), zero.clone()
    compiled.gelu(x, zero, approximate, act)
    compiled.gelu_backward(x, zero, approximate, slope, again, room)
    exact, torchs = [], []
    for found, dtype in ((exact, torch.float64), (torchs, torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        found.append(F.gelu(leaf, approximate=approximate))
        found[0].sum().backward()
        found.append(leaf.grad)
    for ours, theirs, right in zip((act, slope), torchs, exact, strict=True):
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max()
    ends = torch.tensor([[1e15, -1e15, 1e4, -1e4, float("nan"), 0.0, -0.0]])
    out, slope = torch.empty_like(ends), torch.ones_like(ends)
    compiled.gelu_backward(ends, torch.zeros(7), approximate, slope, out, torch.empty(7))
    torch.testing.assert_close(out, torch.tensor([[1e15, 0.0, 1e4, 0.0, float("nan"), 0.0, 0.0]]), equal_nan=True)
    torch.testing.assert_close(slope, torch.tensor([[1.0, 0.0, 1.0, 0.0, float("nan"), 0.5, 0.5]]), equal_nan=True)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    of_expert=st.lists(st.integers(0, 14), min_size=1, max_size=5),
    dim=st.integers(1, 140),
    hidden_dim=st.integers(1, 300),
    threads=st.integers(1, 3),
    act=st.sampled_from(["gelu", "gelu_tanh"]),
)
def test_products_of_few_rows(of_expert: list[int], dim: int, hidden_dim: int, threads: int, act: str) -> None:
    torch.set_num_threads(threads)
    layer = MoeMlp(dim, hidden_dim, len(of_expert), act=act).requires_grad_(False).experts
    layer.fc1.bias.normal_()
    weights = layer.fc1.weight, layer.fc1.bias, layer.fc2.weight
    x_ND = torch.randn(9, dim)
    item_P = torch.randint(9, (sum(of_expert),))
    out_PD, _ = compiled.few_rows(x_ND, *weights, item_P, of_expert, layer.gelu, keep=False)
    parts = [
        F.gelu(x @ w1 + b1, approximate=layer.gelu) @ w2
        for x, w1, b1, w2 in zip(x_ND[item_P].split(of_expert), *weights, strict=True)
    ]
    torch.testing.assert_close(out_PD[:, :dim], torch.cat(parts), atol=3e-5, rtol=1e-5)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    of_expert=st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any),
    dim=st.integers(1, 140),
    hidden_dim=st.integers(1, 300),
    threads=st.integers(1, 3),
    act=st.sampled_from(["gelu", "gelu_tanh"]),
    large=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_through_products_of_few_rows(of_expert, dim, hidden_dim, threads, act, large, seed) -> None:
    """All of them, against autograd in float64; more rows than one pass takes; sizes that fill no tile and that do."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if large:  # whole tiles, which a large gradient writes past the caches
        dim, hidden_dim = 64 * max(1, dim // 64), 64 * max(1, hidden_dim // 64)
    experts = MoeMlp(dim, hidden_dim, len(of_expert), act=act).experts
    weights = experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias
    experts_P = torch.repeat_interleave(torch.arange(len(of_expert)), torch.tensor(of_expert))
    order_M, counts_E = dispatch.sort_by_expert(experts_P[torch.randperm(len(experts_P))].unsqueeze(1), len(of_expert))
    experts_NK = torch.empty_like(experts_P).index_put_((order_M,), experts_P).unsqueeze(1)
    x_ND, gates_NK = torch.randn(len(experts_P), dim), torch.rand(len(experts_P), 1)
    found = []
    for function, dtype in ((_FewRowsExperts, torch.float32), (_SortedExperts, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x_ND, *weights, gates_NK)]
        with mock.patch.object(compiled, "LARGE", 1 if large else 2**40):
            y_ND = function.apply(*leaves, experts_NK, order_M, counts_E.tolist(), experts.gelu)
            y_ND.backward(torch.linspace(-1, 1, y_ND.numel(), dtype=dtype).view(y_ND.shape))
        found.append([y_ND.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=5e-6 * max(5, exact.abs().max()), rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])  # which three are from 3,000 items on: below, one does the work
@pytest.mark.parametrize("items", [3, 20, 100, 3000], ids="{} items".format)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_layer_is_that_of_torch_in_float64(items: int, top_k: int, threads: int) -> None:
    """Forward without gradients (up to few items by products of our own), forward with, and all gradients."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
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
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=5e-6 * max(5, exact.abs().max()), rtol=1e-4)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    num_experts=st.integers(1, 20),
    threads=st.integers(1, 3),
    noise_std=st.sampled_from([0.0, 0.3]),
    tied=st.booleans(),
    data=st.data(),
)
def test_routing_is_that_of_autograd(n, num_experts, threads, noise_std, tied, data) -> None:
    """Experts, gates, sums, and what the logits get from gates, importance and load; at ties too."""
    torch.set_num_threads(threads)
    router = NoisyTopKRouter(7, num_experts, data.draw(st.integers(1, num_experts)), noise_std)
    with torch.no_grad():
        router.weight.normal_()
        if tied:
            router.weight.mul_(2).round_().clamp_(-1, 1)
    items = torch.randn(n, 7).round().requires_grad_()
    found = []
    for with_kernels in (True, False):
        with mock.patch.object(compiled, "serves", lambda *tensors, told=with_kernels: told):
            torch.manual_seed(n)
            routing = router(items)
            totals = balance.expert_totals(routing, noise_std)
            meter = telemetry.RoutingMeter(num_experts)
            meter.update(routing, None, totals.sum())
            weights = (torch.linspace(-1, 2, t.numel()).view(t.shape) for t in (routing.gates_NK, totals))
            both = sum((t * weight).sum() for t, weight in zip((routing.gates_NK, totals), weights, strict=True))
            gradients = [
                torch.autograd.grad(part, router.weight, retain_graph=True)[0] for part in (both, totals.sum())
            ]
            found.append([*routing[:4], totals, *gradients, *meter.stats().__dict__.values()])
            assert (routing.sums is not None) == with_kernels
    for ours, autograds in zip(*found, strict=True):
        torch.testing.assert_close(ours, autograds, atol=2e-5, rtol=1e-4)


@needs_kernels
def test_items_by_columns_and_gradients_of_the_gates_alone() -> None:
    router = NoisyTopKRouter(7, 3, 2, noise_std=0.0)
    items = torch.randn(7, 20).t().requires_grad_()
    found = []
    for with_kernels in (True, False):
        with mock.patch.object(compiled, "serves", lambda *tensors, told=with_kernels: told):
            gates_NK = router(items).gates_NK
            found.append([gates_NK, *torch.autograd.grad(gates_NK[:, 1].sum(), [items, router.weight])])
    for ours, autograds in zip(*found, strict=True):
        torch.testing.assert_close(ours, autograds, atol=1e-6, rtol=1e-5)


@needs_kernels
def test_many_items_and_a_logit_that_is_not_a_number() -> None:
    """More items than one block of sums; NaN reaches only its own item's gates, and some expert is chosen."""
    x = torch.randn(5000, 3)
    gates, experts, logits, _, sums = compiled.route(x, torch.eye(3), None, 0.0, 2, True)
    assert torch.equal(logits, x)
    torch.testing.assert_close(sums[:3], x.softmax(-1).sum(0))
    assert sums[6:9].tolist() == torch.bincount(experts.flatten(), minlength=3).tolist()
    x[7] = float("nan")
    spoilt, experts, *_ = compiled.route(x, torch.eye(3), None, 0.0, 2, False)
    assert spoilt[7].isnan().all()
    assert sorted(experts[7].tolist()) == [0, 1]
    assert torch.equal(spoilt[8:], gates[8:])


@needs_kernels
def test_far_from_where_they_bend_slopes_are_zero_and_not_subnormal() -> None:
    """A subnormal number, below float32's tiny, costs a processor a hundred cycles; all of them were such."""
    tiny = torch.finfo(torch.float32).tiny
    x = torch.linspace(-40, -5, 5001).view(1, -1)
    zero, act, slope = torch.zeros(x.shape[1]), torch.empty_like(x), torch.ones_like(x)
    compiled.gelu_backward(x, zero, "none", slope, act, zero.clone())
    # of the load of two experts, up to 64 standard deviations from the threshold; an item's is its column
    weight = torch.linspace(0.1, 4, 200) * torch.tensor([[1.0], [-1.0]])
    of_load = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    _, experts, logits, noisy, _ = compiled.route(torch.eye(200), weight, torch.zeros(200, 2), 0.125, 1, False)
    grad = compiled.route_backward(torch.eye(200), weight, logits, noisy, 0.125, experts, None, of_load, None)
    for found in (slope, grad):
        assert found.abs().max() > 1e-7
        assert found.abs().min() == 0
    for found in (act, slope, grad):
        assert found[found != 0].abs().min() >= tiny


@needs_kernels
@given(m=st.integers(0, 200), num_experts=st.integers(1, 9))
def test_sorting_is_dispatchs(m: int, num_experts: int) -> None:
    experts_NK = torch.randint(num_experts, (m, 2))
    for ours, its in zip(*(f.sort_by_expert(experts_NK, num_experts) for f in (compiled, dispatch)), strict=True):
        assert torch.equal(ours, its)


@needs_kernels
def test_the_same_threads_give_the_same_bits() -> None:
    torch.set_num_threads(2)
    layer = MoeMlp(96, 384, 4)
    x = torch.randn(700, 96)
    for run in (lambda: layer.eval()(x), lambda: layer.eval()(x[:20])):
        with torch.no_grad():
            assert all(torch.equal(run(), run()) for _ in range(5))
    layer.eval().requires_grad_(True)
    gradients = [torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())) for _ in range(5)]
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


@needs_kernels
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


@needs_kernels
def test_kernels_take_only_what_they_know() -> None:
    x = torch.randn(5, 8)
    assert compiled.serves(x)
    assert not compiled.serves(x, x.double())
    assert not compiled.serves(x.bfloat16())
    assert not compiled.serves(torch.empty(5, 8, device="meta"))
    with torch.autocast("cpu"):
        assert not compiled.serves(x)


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors of the x86 family")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_kernels_for_lesser_processors(processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of four and of eight numbers, not sixteen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in compiled._FLAGS]
    monkeypatch.setattr(compiled, "_FLAGS", flags)
    library = compiled._load.__wrapped__()
    monkeypatch.setattr(compiled, "_load", lambda: library)
    test_gelu_is_about_as_exact_as_torchs("none")
    test_gelu_is_about_as_exact_as_torchs("tanh")
    test_far_from_where_they_bend_slopes_are_zero_and_not_subnormal()
    test_many_items_and_a_logit_that_is_not_a_number()
    for items in (3, 20, 100, 3000):
        test_the_layer_is_that_of_torch_in_float64(items, top_k=2, threads=1)


class TestLoading:
    """In another cache, as in a new home."""

    @pytest.fixture(autouse=True)
    def new_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        if sys.platform != "linux" or not compiled._compiler():
            pytest.skip("there is no C compiler")
        monkeypatch.delenv("SPARSE_MLP_C_KERNELS", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "sparse_mlp"

    def test_is_compiled_once(self, new_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(compiled._load.__wrapped__(), ctypes.CDLL)
        assert [path.suffix for path in new_home.iterdir()] == [".so"], "and nothing is left over"
        monkeypatch.setattr(compiled.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
        assert isinstance(compiled._load.__wrapped__(), ctypes.CDLL)

    def test_a_change_of_the_source_is_another_library(self, new_home: Path, tmp_path: Path, monkeypatch) -> None:
        compiled._load.__wrapped__()
        changed = tmp_path / "kernels.c"
        changed.write_text(compiled._SOURCE.read_text() + "\n/* changed */\n")
        monkeypatch.setattr(compiled, "_SOURCE", changed)
        compiled._load.__wrapped__()
        assert len(list(new_home.iterdir())) == 2

    def test_can_be_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SPARSE_MLP_C_KERNELS", "0")
        assert compiled._load.__wrapped__() == "switched off by SPARSE_MLP_C_KERNELS=0"

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert "no C compiler" in compiled._load.__wrapped__()

    def test_a_compiler_that_fails_is_named_once(self, tmp_path: Path, new_home: Path, monkeypatch, caplog) -> None:
        broken = tmp_path / "mycc"
        broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 3\n")
        broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(broken))
        with caplog.at_level(logging.WARNING):
            assert compiled._load.__wrapped__() == f"{broken} failed: no space left"
        assert "no space left" in caplog.text
        assert list(new_home.iterdir()) == []

    def test_a_compiler_that_fails_without_a_word(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = tmp_path / "mycc"
        broken.write_text("#!/bin/sh\necho >&2\nexit 3\n")
        broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(broken))
        assert "exit status 3" in compiled._load.__wrapped__()

    def test_a_home_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
        assert isinstance(compiled._load.__wrapped__(), ctypes.CDLL)
        assert len(list(tmp_path.glob("sparse_mlp-*/kernels-*.so"))) == 1
