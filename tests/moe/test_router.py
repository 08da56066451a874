"""The router: gates, noise, and that the task's gradient reaches it."""

import pytest
import torch

from sparse_mlp.moe import MoeMlp, NoisyTopKRouter
from sparse_mlp.moe.router import top_gates

pytestmark = pytest.mark.usefixtures("backend")


def test_gates_are_the_raw_softmax_values_in_falling_order() -> None:
    router = NoisyTopKRouter(3, 3, 2).eval()
    router.weight.data = torch.eye(3)
    routing = router(torch.tensor([[0.0, 2.0, 1.0]]))
    # softmax(0, 2, 1) = (e^0, e^2, e^1) / (1 + e^2 + e) = 0.0900, 0.6652, 0.2447
    torch.testing.assert_close(routing.gates_NK, torch.tensor([[0.66524, 0.24473]]), atol=1e-5, rtol=0)
    assert routing.experts_NK.tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 4), (49, 8), (5, 64)])
def test_gates_are_torchs_topk_of_the_softmax(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    for k in (1, min(3, shape[1])):
        gates, experts = top_gates(logits, k)
        wanted, indices = logits.softmax(-1).topk(k, dim=-1)
        torch.testing.assert_close(gates, wanted)
        assert torch.equal(experts, indices)
        weights = torch.randn_like(gates)
        grads = [torch.autograd.grad(g, logits, weights, retain_graph=True)[0] for g in (gates, wanted)]
        torch.testing.assert_close(*grads)


def test_of_equal_logits_the_first_comes_first() -> None:
    _, experts = top_gates(torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 3)
    assert experts.tolist() == [[1, 2, 0], [0, 1, 2]]


def test_a_logit_that_is_not_a_number_reaches_only_its_own_items_gates() -> None:
    logits = torch.randn(5000, 3)
    gates, _ = top_gates(logits, 2)
    logits[7] = float("nan")
    spoilt, experts = top_gates(logits, 2)
    assert spoilt[7].isnan().all()
    assert len(set(experts[7].tolist())) == 2
    assert torch.equal(spoilt[8:], gates[8:])


def test_experts_whose_gates_round_to_zero_are_still_told_apart() -> None:
    router = NoisyTopKRouter(4, 4, 3).eval()
    router.weight.data = torch.eye(4)
    routing = router(torch.tensor([[-500.0, 500.0, -400.0, -300.0]]))
    assert routing.experts_NK.tolist() == [[1, 3, 2]]
    assert routing.gates_NK.tolist() == [[1.0, 0.0, 0.0]]


def test_gates_have_the_gradient_of_the_softmaxs_largest_values() -> None:
    torch.manual_seed(0)
    router = NoisyTopKRouter(6, 5, 2).double().eval()
    items, weights = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    plain = (items @ router.weight.t()).softmax(-1).topk(2).values
    ours = router(items).gates_NK
    grads = [torch.autograd.grad((gates * weights).sum(), router.weight)[0] for gates in (ours, plain)]
    torch.testing.assert_close(*grads)


def test_noise_in_training_only_with_the_papers_deviation() -> None:
    torch.manual_seed(0)
    router = NoisyTopKRouter(4, 8, 1)
    items = torch.randn(20_000, 4)
    routing = router(items)
    noise = routing.noisy_NE - routing.logits_NE
    assert noise.std().item() == pytest.approx(1 / 8, rel=0.01)
    assert abs(noise.mean().item()) < 1e-3
    router.eval()
    routing = router(items)
    assert routing.noisy_NE is routing.logits_NE
    torch.testing.assert_close(router(items).gates_NK, routing.gates_NK, atol=0, rtol=0)


def test_two_seeds_route_differently_and_one_seed_alike() -> None:
    router = NoisyTopKRouter(16, 8, 1)
    items = torch.randn(200, 16)

    def experts(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return router(items).experts_NK

    assert torch.equal(experts(1), experts(1))
    assert not torch.equal(experts(1), experts(2))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_task_alone_moves_the_router_at_initialisation(top_k: int) -> None:
    torch.manual_seed(0)
    layer = MoeMlp(32, 64, 4, top_k, balance_weight=0.0)
    (layer(torch.randn(100, 32)) ** 2).mean().backward()
    gradient = layer.router.weight.grad
    assert gradient is not None
    # renormalised gates would leave about 1e-9 at K=1, and equal experts about 1e-10 at K=2
    assert gradient.norm() > 1e-4


def test_arithmetic_is_float32_under_autocast_and_in_bfloat16() -> None:
    router = NoisyTopKRouter(16, 4, 2).eval()
    items = torch.randn(50, 16)
    wanted = router(items)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(items)
    assert routing.gates_NK.dtype == torch.float32
    torch.testing.assert_close(routing.gates_NK, wanted.gates_NK, atol=1e-7, rtol=0)
    assert router.bfloat16()(items.bfloat16()).gates_NK.dtype == torch.float32
    assert router.double()(items.double()).gates_NK.dtype == torch.float64


def test_renormalised_gates_add_up_to_one() -> None:
    router = NoisyTopKRouter(3, 3, 2, renormalize=True).eval()
    router.weight.data = torch.eye(3)
    routing = router(torch.tensor([[0.0, 2.0, 1.0]]))
    # e^2 / (e^2 + e) = 0.7311 and e / (e^2 + e) = 0.2689
    torch.testing.assert_close(routing.gates_NK, torch.tensor([[0.73106, 0.26894]]), atol=1e-5, rtol=0)


def test_a_renormalised_gate_of_one_expert_is_one_and_has_the_gradient_of_its_logarithm() -> None:
    router = NoisyTopKRouter(3, 3, 1, renormalize=True).eval()
    router.weight.data = torch.eye(3)
    x = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
    routing = router(x)
    assert routing.gates_NK.tolist() == [[1.0]]
    routing.gates_NK.sum().backward()
    # d log softmax_1 / d logits = (0, 1, 0) - softmax(0, 2, 1) = (-0.0900, 1 - 0.6652, -0.2447)
    torch.testing.assert_close(x.grad, torch.tensor([[-0.09003, 0.33476, -0.24473]]), atol=1e-5, rtol=0)


def test_sigmoid_scores_are_those_of_each_logit_alone() -> None:
    router = NoisyTopKRouter(3, 3, 2, scores="sigmoid").eval()
    router.weight.data = torch.eye(3)
    routing = router(torch.tensor([[0.0, 2.0, -1.0], [90.0, 91.0, 92.0]]))
    assert routing.experts_NK.tolist() == [[1, 0], [2, 1]]  # by the logits where the scores round to one number
    torch.testing.assert_close(routing.gates_NK, torch.tensor([[0.88080, 0.5], [1.0, 1.0]]), atol=1e-5, rtol=0)


def test_scores_that_vanish_renormalise_to_something_finite() -> None:
    router = NoisyTopKRouter(2, 2, 1, scores="sigmoid", renormalize=True).eval()
    router.weight.data = torch.eye(2)
    x = torch.tensor([[-500.0, -400.0]], requires_grad=True)
    gates = router(x).gates_NK
    gates.sum().backward()
    assert gates.isfinite().all() and x.grad.isfinite().all()
