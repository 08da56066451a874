"""Experts pruned and merged by what a user's images use."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import sparse_mlp
from sparse_mlp.errors import UserError
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.telemetry import moe_layers
from sparse_mlp.weights import merge_experts, prune_experts

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(**arguments) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4, **arguments).eval()


class Routed(nn.Module):
    """Items (one-hot, so that each goes to the expert of its number) of which there are more or fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = MoeMlp(4, 8, 4)
        self.mlp.router.weight.data = 9 * torch.eye(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


ITEMS = torch.eye(4)[[0, 1, 1, 1, 3, 3]]


def test_the_experts_that_are_used_most_stay() -> None:
    model = Routed().eval()
    expected, fc1 = model(ITEMS), model.mlp.experts.fc1.weight.detach()
    prune_experts(model, [ITEMS[:3], ITEMS[3:]], keep=2)
    assert torch.equal(model.mlp.experts.fc1.weight, fc1[[1, 3]])
    assert model.mlp.num_experts == 2
    torch.testing.assert_close(model(ITEMS)[1:], expected[1:], rtol=1e-3, atol=1e-3)  # 9's softmax is nearly 1
    model.train()(ITEMS).sum().backward()
    assert model.mlp.meter.load.tolist() == pytest.approx([3 / 6, 2 / 6], abs=0.2)


def test_merged_experts_are_the_mean_by_use_of_those_that_are_alike() -> None:
    model = Routed().eval()
    model.mlp.router.weight.data[2] = 5 * torch.eye(4)[1] + 6 * torch.eye(4)[2]  # 2 is like 1
    model.mlp.router.weight.data[0] = 5 * torch.eye(4)[3] + 6 * torch.eye(4)[0]  # 0 is like 3
    fc1 = model.mlp.experts.fc1.weight.detach().clone()
    items = torch.eye(4)[[0, 1, 1, 1, 2, 3, 3]]
    with torch.no_grad():
        routing = model.mlp.router(items)
    gates = torch.zeros(4).index_add_(0, routing.experts_NK[:, 0], routing.gates_NK[:, 0])
    merge_experts(model, items, keep=2)
    for merged, members in zip(model.mlp.experts.fc1.weight, ([1, 2], [0, 3]), strict=True):
        weights = gates[members] / gates[members].sum()
        torch.testing.assert_close(merged.detach(), weights[0] * fc1[members[0]] + weights[1] * fc1[members[1]])


@pytest.mark.parametrize("fewer", [prune_experts, merge_experts])
def test_experts_that_are_still_copies_can_go_without_a_change(fewer) -> None:
    dense = vit()
    expected = dense(IMAGES)
    model = sparse_mlp.sparsify(vit(), 2, num_experts=4, top_k=2)
    assert fewer(model, IMAGES, keep=2) is model
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert all(layer.num_experts == 2 for layer in moe_layers(model).values())


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("fewer", [prune_experts, merge_experts])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "eva02_tiny_patch14_224"])
def test_one_expert_is_a_dense_model_that_timm_loads(name: str, fewer, renormalize: bool, tmp_path) -> None:
    arguments = {"img_size": 28} if name.startswith("eva") else {"img_size": 32} if name.startswith("vit") else {}
    images = IMAGES[..., :28, :28] if name.startswith("eva") else IMAGES
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **arguments)
    sparse_mlp.sparsify(model, 2, num_experts=3, top_k=2, init="noise", renormalize=renormalize).eval()
    fewer(model, images, keep=1)
    assert not moe_layers(model)
    torch.save(model.state_dict(), tmp_path / "dense.pth")
    plain = timm.create_model(name, num_classes=4, checkpoint_path=str(tmp_path / "dense.pth"), **arguments).eval()
    torch.testing.assert_close(plain(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "keep", "message"),
    [
        ({}, 5, r"keep 5 must be between 1 and the 4 experts of blocks\.2\.mlp"),
        ({}, 0, "keep 0 must be between 1"),
        ({"shared_experts": 1}, 1, "cannot become one MLP: it has shared experts"),
        ({"scores": "sigmoid", "renormalize": False}, 1, "the gate of one expert is not 1"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: dict, keep: int, message: str) -> None:
    model = sparse_mlp.sparsify(vit(), 1, num_experts=4, **arguments)
    with pytest.raises(UserError, match=message):
        prune_experts(model, IMAGES, keep)


def test_without_experts_or_images() -> None:
    with pytest.raises(UserError, match="has no experts"):
        merge_experts(vit(), IMAGES, 1)
    with pytest.raises(UserError, match="there are no images"):
        prune_experts(sparse_mlp.sparsify(vit(), 1), [], 1)
