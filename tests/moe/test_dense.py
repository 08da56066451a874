"""Experts that begin as a dense MLP, and back."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.layers.mlp import ConvMlp
from timm.models.metaformer import StarReLU
from torch import nn

from sparse_mlp.mixing.linear import Mlp as OwnMlp
from sparse_mlp.models.sparse_mlp import DenseMlp
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.dense import to_mlp

MLPS = {
    "gelu": lambda: Mlp(16, 32),
    "gelu_tanh": lambda: Mlp(16, 32, act_layer=lambda: nn.GELU(approximate="tanh")),
    "relu without biases": lambda: Mlp(16, 32, act_layer=nn.ReLU, bias=False),
    "silu with norm and dropout": lambda: Mlp(16, 32, act_layer=nn.SiLU, norm_layer=nn.LayerNorm, drop=0.1),
    "star relu": lambda: Mlp(16, 32, act_layer=StarReLU, use_conv=True, bias=(True, False)),
    "glu": lambda: GluMlp(16, 64),
    "glu of convolutions": lambda: GluMlp(16, 64, use_conv=True),
    "packed swiglu": lambda: SwiGLUPacked(16, 64, norm_layer=nn.LayerNorm),
    "swiglu": lambda: SwiGLU(16, 32),
    "convolutions": lambda: ConvMlp(16, 32),
    "sparse_mlp's": lambda: DenseMlp(16, 32),
    "the kin's": lambda: OwnMlp(16, 32),
}


def make(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    mlp = MLPS[kind]().eval()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3)
    channels_first = any(isinstance(module, nn.Conv2d) for module in mlp.children())
    return mlp, torch.randn(2, 16, 3, 5) if channels_first else torch.randn(2, 15, 16)


@pytest.mark.parametrize("shared_experts", [0, 2])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", MLPS)
def test_the_answers_are_the_mlps(kind: str, top_k: int, shared_experts: int) -> None:
    mlp, x = make(kind)
    layer = MoeMlp.from_mlp(mlp, 4, top_k, renormalize=True, shared_experts=shared_experts)
    assert not layer.training
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-5, atol=1e-5)
    layer.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in mlp.parameters())


@pytest.mark.parametrize("known", [True, False], ids=["its own type", "timm's"])
@pytest.mark.parametrize("kind", MLPS)
def test_an_expert_is_that_mlp_again(kind: str, known: bool) -> None:
    mlp, x = make(kind)
    layer = MoeMlp.from_mlp(mlp, 4)
    if known:
        back = to_mlp(copy.deepcopy(layer), 2)
        assert type(back) is type(mlp)
        assert {n: v.shape for n, v in back.state_dict().items()} == {n: v.shape for n, v in mlp.state_dict().items()}
    else:
        layer.origin = None
        back = to_mlp(layer, 2)
    torch.testing.assert_close(back(x), mlp(x))


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (GlobalResponseNormMlp(8, 16), "taken over all positions of an image"),
        (GatedMlp(8, 16), "mixes positions"),
        (Mlp(8, 16, 4), "maps 8 channels to 4"),
        (Mlp(8, 16, norm_layer=nn.BatchNorm1d), "BatchNorm1d does not norm each item by itself"),
        (ConvMlp(8, 16, norm_layer=nn.BatchNorm2d), "BatchNorm2d lies before the activation"),
        (nn.Linear(8, 8), "a Linear is no MLP"),
        (type("OtherMlp", (Mlp,), {"forward": lambda self, x: x})(8, 16), "with a forward of its own"),
    ],
)
def test_what_experts_cannot_stand_for_says_why(mlp: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeMlp.from_mlp(mlp, 4)


def test_a_layer_with_shared_experts_is_no_one_mlp() -> None:
    with pytest.raises(ValueError, match="shared experts"):
        to_mlp(MoeMlp(8, 16, 4, shared_experts=1))


def test_a_model_of_timms_is_built_with_experts() -> None:
    mlp_layer = MoeMlp.as_mlp_layer(num_experts=4, top_k=2, renormalize=True)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, mlp_layer=mlp_layer, proj_drop_rate=0.1, num_classes=3
    )
    layers = [module for module in model.modules() if isinstance(module, MoeMlp)]
    assert len(layers) == 2 and layers[0].top_k == 2
    assert layers[0].experts.drop1.p == 0.1
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="to 7"):
        mlp_layer(8, 16, 7)
