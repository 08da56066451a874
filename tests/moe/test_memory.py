"""Gradients' memory is used again only when nothing looks at it any more."""

import gc

import pytest
import torch

from sparse_mlp.moe import MoeMlp, memory


@pytest.fixture(autouse=True)
def keep_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "KEEP_FROM", 1)
    memory.give_back()
    yield
    memory.give_back()


def test_a_block_is_used_again_once_its_tensor_and_views_are_gone() -> None:
    weight = torch.zeros(3, 5, dtype=torch.float64)
    first = memory.gradient_like(weight)
    assert (first.shape, first.dtype, first.is_contiguous()) == (weight.shape, weight.dtype, True)
    place, row = first.data_ptr(), first.fill_(7)[1]
    second = memory.gradient_like(weight)
    assert second.data_ptr() != place
    del first
    gc.collect()
    third = memory.gradient_like(weight)
    assert third.data_ptr() != place, "a view still looks at it"
    third.fill_(1)
    assert (row == 7).all()
    del row
    gc.collect()
    assert memory.gradient_like(weight).data_ptr() == place


def test_other_sizes_give_back_what_lies_free() -> None:
    del_me = memory.gradient_like(torch.zeros(100))
    del del_me
    gc.collect()
    assert memory.kept() == 400
    kept = memory.gradient_like(torch.zeros(200))
    assert memory.kept() == 0
    assert kept.numel() == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_fresh_memory_step_after_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = MoeMlp(16, 24, 4, 2, noise_std=0.0, dtype=dtype)
    batches = torch.randn(3, 40, 16, dtype=dtype)

    def gradients() -> list[list[torch.Tensor]]:
        steps = []
        for x in batches:
            layer.zero_grad(set_to_none=True)
            layer(x).square().sum().backward()
            steps.append([p.grad.clone() for p in layer.parameters()])
        return steps

    kept = gradients()
    held = [p.grad for p in layer.parameters()]  # an optimiser or a hook may keep a gradient over a step
    values = [grad.clone() for grad in held]
    gradients()
    assert all(torch.equal(a, b) for a, b in zip(held, values, strict=True))
    monkeypatch.setattr(memory, "KEEP_FROM", 2**60)
    for a, b in zip(kept, gradients(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
