"""Balance losses against V-MoE's reference vectors, and how their gradient enters a loop."""

import copy

import pytest
import torch

from sparse_mlp.moe import MoeMlp, balance, collect_balance_loss, set_balance_scale, telemetry

pytestmark = pytest.mark.usefixtures("backend")


def totals_of(layer: MoeMlp, x: torch.Tensor) -> torch.Tensor:
    """Without noise."""
    routing = layer.router(x)
    return balance.expert_totals(routing.logits_NE, routing.noisy_NE, routing.experts_NK, 0.0)[0]


def test_importance_loss_of_vmoes_vector() -> None:
    gates = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
    # sums 1.7, 1.1, 1.2; mean 4/3, variance (0.1344 + 0.0544 + 0.0178) / 3 = 0.06889; 0.06889 / 1.7778 = 0.03875
    assert balance.squared_variation(gates.sum(0)).item() == pytest.approx(0.03874999, abs=1e-6)
    logits = gates.clamp_min(1e-30).log()
    assert balance.squared_variation(balance.importance(logits)).item() == pytest.approx(0.03874999, abs=1e-6)


def test_load_loss_of_vmoes_vector() -> None:
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = torch.tensor([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]])
    threshold = (logits + noise).topk(2)[0][:, -1:]
    totals = balance.load(logits, threshold, noise_std=0.1)
    assert balance.squared_variation(totals).item() == pytest.approx(0.48573864536, abs=1e-6)


def test_balance_loss_is_half_of_each_and_importance_alone_without_noise() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 4)
    noisy = logits + 0.25 * torch.randn(50, 4)
    _, experts = noisy.topk(2)
    routing = logits, noisy, experts
    imp = balance.squared_variation(balance.importance(logits))
    load = balance.squared_variation(balance.load(logits, noisy.topk(2)[0][:, -1:], 0.25))
    torch.testing.assert_close(balance.balance_loss(balance.expert_totals(*routing, 0.25)[0]), imp / 2 + load / 2)
    torch.testing.assert_close(balance.balance_loss(balance.expert_totals(*routing, 0.0)[0]), imp / 2)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_gradients_are_finite_at_perfect_balance_with_one_expert_and_a_zero_router(num_experts: int) -> None:
    layer = MoeMlp(8, 8, num_experts)
    torch.nn.init.zeros_(layer.router.weight)
    layer(torch.randn(16, 8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
    assert layer.router.weight.grad is not None
    totals = torch.full((4,), 2.0, requires_grad=True)
    balance.squared_variation(totals).backward()
    assert totals.grad is not None and totals.grad.abs().max() == 0


def test_injected_gradient_is_that_of_adding_the_loss() -> None:
    torch.manual_seed(0)
    layer = MoeMlp(8, 16, 4, 2, balance_weight=0.3, noise_std=0.0)
    x = torch.randn(20, 8)
    layer(x).pow(2).mean().backward()
    injected = layer.router.weight.grad.clone()

    layer.zero_grad()
    plain = copy.deepcopy(layer)
    plain.balance_weight = 0.0
    added = 0.3 * balance.balance_loss(totals_of(plain, x))
    (plain(x).pow(2).mean() + added).backward()
    torch.testing.assert_close(injected, plain.router.weight.grad)


@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_scale_follows_the_loops_loss(factor: float) -> None:
    """Accumulation divides the loss and fp16 scaling multiplies it; the injected part must follow."""
    torch.manual_seed(0)
    layer = MoeMlp(8, 16, 4, balance_weight=0.3, noise_std=0.0)
    x = torch.randn(20, 8)
    layer(x).pow(2).mean().backward()
    wanted = layer.router.weight.grad.clone() * factor
    layer.zero_grad()
    set_balance_scale(layer, factor)
    (layer(x).pow(2).mean() * factor).backward()
    torch.testing.assert_close(layer.router.weight.grad, wanted)


def test_balance_reaches_the_router_through_any_loss_and_evens_the_load() -> None:
    torch.manual_seed(0)
    layer = MoeMlp(8, 8, 4, balance_weight=1.0)
    layer.router.weight.data[0] += 0.5  # expert 0 is everybody's favourite
    x = torch.randn(512, 8) + 1
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.3)
    layer(x)
    before = telemetry.collect(layer)[""].load.max()
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x).sum() * 0).backward()
        optimizer.step()
    after = telemetry.collect(layer)[""].load.max()
    assert before > 0.9
    assert after < 0.5


def test_a_reduced_total_is_what_the_loss_is_taken_of() -> None:
    """Ranks sum their totals: two halves that see each other's totals give the whole batch's loss and gradient."""
    torch.manual_seed(0)
    whole = MoeMlp(8, 8, 4, balance_weight=1.0, noise_std=0.0)
    x = torch.randn(32, 8)
    whole(x).mul(0).sum().backward()
    halves = [copy.deepcopy(whole) for _ in range(2)]
    others = [totals_of(whole, half).detach() for half in x.chunk(2)]
    for layer, half, other in zip(halves, x.chunk(2), reversed(others), strict=True):
        layer.zero_grad()
        layer.balance_reduce = lambda totals, other=other: totals + other
        layer(half).mul(0).sum().backward()
        torch.testing.assert_close(layer.meter.balance_loss, whole.meter.balance_loss)
    total = halves[0].router.weight.grad + halves[1].router.weight.grad
    torch.testing.assert_close(total, whole.router.weight.grad)


def test_far_from_the_threshold_the_loads_gradient_is_zero_and_not_subnormal() -> None:
    """A subnormal number, below float32's tiny, costs a processor a hundred cycles."""
    logits_NE = torch.linspace(-4, 4, 1001).view(-1, 1).requires_grad_()  # up to 32 standard deviations
    (grad_NE,) = torch.autograd.grad(balance.load(logits_NE, torch.zeros(1001, 1), 0.125).sum(), logits_NE)
    assert grad_NE.max() > 1
    assert grad_NE.min() == 0
    assert grad_NE[grad_NE != 0].min() >= torch.finfo(torch.float32).tiny


def balanced_layer() -> tuple[MoeMlp, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoeMlp(8, 16, 4, balance_weight=0.3, noise_std=0.0)
    torch.nn.init.normal_(layer.router.weight)
    return layer, torch.randn(80, 8)


def router_gradient(layer: MoeMlp) -> torch.Tensor:
    gradient = layer.router.weight.grad
    assert gradient is not None
    layer.zero_grad()
    return gradient.clone()


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_foreign_loop_with_the_scale_or_with_the_loss_collected(accumulation: int, loss_scale: float) -> None:
    """A plain loop with accumulation, fp16 scaling or both: the mean over micro-batches of task and balance loss."""
    layer, x = balanced_layer()
    wanted = torch.zeros_like(layer.router.weight)
    for part in x.chunk(accumulation):  # one at a time, unscaled
        layer(part).square().mean().backward()
        wanted += router_gradient(layer) / accumulation

    set_balance_scale(layer, loss_scale / accumulation)
    for part in x.chunk(accumulation):
        (layer(part).square().mean() / accumulation * loss_scale).backward()
    torch.testing.assert_close(router_gradient(layer) / loss_scale, wanted)

    set_balance_scale(layer, 1.0)
    for part in x.chunk(accumulation):
        with collect_balance_loss(layer) as balance_losses:
            y = layer(part)
        loss = y.square().mean() + sum(balance_losses)
        (loss / accumulation * loss_scale).backward()
    torch.testing.assert_close(router_gradient(layer) / loss_scale, wanted)


def test_losses_are_collected_from_every_layer_and_only_inside_the_block() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(MoeMlp(8, 8, 4, balance_weight=0.5), torch.nn.Tanh(), MoeMlp(8, 8, 2))
    x = torch.randn(20, 8)
    with collect_balance_loss(model) as losses:
        model(x)
        assert len(losses) == 2
        model.eval()(x)
        assert len(losses) == 2, "evaluation has none"
    torch.testing.assert_close(losses[0].detach(), 0.5 * model[0].meter.balance_loss)
    model.train()
    model(x).mul(0).sum().backward()
    assert len(losses) == 2
    assert model[0].router.weight.grad.abs().max() > 0, "and injects again"
    copy.deepcopy(model)


def test_nothing_is_injected_while_losses_are_collected() -> None:
    layer, x = balanced_layer()
    with collect_balance_loss(layer):
        y = layer(x)
    y.mul(0).sum().backward()
    assert not router_gradient(layer).any()


def test_z_loss_of_two_items_and_its_gradient_in_any_loop() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    # log(2) = 0.6931; log(e + e^3) = 3.1269; (0.4805 + 9.7777) / 2 = 5.1291
    assert balance.z_loss(logits).item() == pytest.approx(5.1291, abs=1e-4)
    assert balance.z_loss(torch.empty(0, 2)).item() == 0

    torch.manual_seed(0)
    layer = MoeMlp(8, 16, 4, balance_weight=0.0, z_loss_weight=0.3, noise_std=0.0)
    x = torch.randn(20, 8)
    layer(x).mul(0).sum().backward()
    injected = router_gradient(layer)
    (0.3 * balance.z_loss(layer.router(x).logits_NE)).backward()
    torch.testing.assert_close(injected, router_gradient(layer))
    with collect_balance_loss(layer) as losses:
        layer(x)
    torch.testing.assert_close(losses[0], 0.3 * balance.z_loss(layer.router(x).logits_NE))
