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
    first, is_new = memory.gradient_like(weight)
    assert is_new
    assert (first.shape, first.dtype, first.is_contiguous()) == (weight.shape, weight.dtype, True)
    place, row = first.data_ptr(), first.fill_(7)[1]
    second, _ = memory.gradient_like(weight)
    assert second.data_ptr() != place
    del first
    gc.collect()
    third, is_new = memory.gradient_like(weight)
    assert is_new and third.data_ptr() != place, "a view still looks at it"
    third.fill_(1)
    assert (row == 7).all()
    del row
    gc.collect()
    fourth, is_new = memory.gradient_like(weight)
    assert fourth.data_ptr() == place and not is_new


def test_other_sizes_give_back_what_lies_free() -> None:
    del_me = memory.gradient_like(torch.zeros(100))
    del del_me
    gc.collect()
    assert memory.kept() == 400
    kept, _ = memory.gradient_like(torch.zeros(200))
    assert memory.kept() == 0
    assert kept.numel() == 200


@pytest.mark.parametrize("to_system", [False, True])
@pytest.mark.parametrize("size", [1, 1000, 5000, 100_000])
def test_what_is_released_is_empty_and_its_neighbours_are_not(size: int, to_system: bool) -> None:
    tensors = [torch.full((size,), float(i)) for i in range(9)]
    for tensor in tensors[1::2]:
        memory.release(tensor, to_system)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors[1::2])
    assert all((tensors[i] == i).all() for i in range(0, 9, 2))


def test_a_kept_graph_gives_the_same_gradients_again_in_new_memory() -> None:
    torch.manual_seed(0)
    layer = MoeMlp(64, 512, 4, 2, noise_std=0.0)
    loss = layer(torch.randn(50, 64)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad for p in layer.parameters()]  # so that the second time must take new memory too
    layer.zero_grad(set_to_none=True)
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, layer.parameters(), strict=True))


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
