"""Feature maps at strides 4 to 32 from any timm model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import sparse_mlp  # noqa: F401 - registers the models
from sparse_mlp.models.feature_maps import STRIDES, FeatureMaps

PYRAMIDS = ["cycle_mlp_b1", "as_mlp_tiny", "hire_mlp_tiny", "resnet18", "pvt_v2_b0", "convnext_atto"]
SMALL = {"img_size": 64}
ISOTROPIC = [
    ("mixer_s16_224", SMALL),
    ("mixer_s32_224", SMALL),
    ("sparse_mlp_s16_224", SMALL),
    ("vit_tiny_patch16_224", SMALL),
    ("vit_tiny_patch16_224", {**SMALL, "dynamic_img_size": True}),
    ("gmlp_s16_224", SMALL),
]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramid_takes_any_size(name):
    maps = FeatureMaps(timm.create_model(name)).eval()
    with torch.no_grad():
        found = maps(torch.randn(1, 3, 76, 100))
    sizes = [(maps.channels[i], math.ceil(76 / s), math.ceil(100 / s)) for i, s in enumerate(STRIDES)]
    # convnext's patches are cut, not padded
    assert [tuple(x.shape[1:]) for x in found] == sizes or name == "convnext_atto"
    assert maps.fixed_size is None and len(found) == 4


@pytest.mark.parametrize(("name", "options"), ISOTROPIC)
def test_one_map_becomes_a_pyramid(name, options):
    maps = FeatureMaps(timm.create_model(name, **options))
    found = maps(torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in found] == [
        (c, 64 // s, 64 // s) for c, s in zip(maps.channels, STRIDES, strict=True)
    ]
    assert maps.fixed_size == (None if "dynamic_img_size" in options else (64, 64))
    sum(x.square().mean() for x in found).backward()
    assert all(p.grad is not None for p in maps.parameters()), "every weight is used: DDP needs no search for others"


@pytest.mark.parametrize("name", ["cycle_mlp_b1", "as_mlp_tiny", "hire_mlp_tiny"])
def test_our_pyramids_have_the_norms_of_the_dense_backbones(name):
    """The maps are those of timm's features_only with output_norms, which the reference outputs are compared with."""
    torch.manual_seed(0)
    maps = FeatureMaps(timm.create_model(name)).eval()
    reference = timm.create_model(name, features_only=True, output_norms=True).eval()
    reference.load_state_dict(maps.getter.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for got, expected in zip(maps(x), reference(x), strict=True):
            assert torch.equal(got, expected)


def test_every_weight_of_a_pyramid_is_used():
    maps = FeatureMaps(timm.create_model("cycle_mlp_b1"))
    sum(x.square().mean() for x in maps(torch.randn(1, 3, 64, 64))).backward()
    assert [name for name, p in maps.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_nothing():
    maps = FeatureMaps(timm.create_model("cycle_mlp_b1"))
    x = torch.randn(1, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        maps.zero_grad()
        maps.set_grad_checkpointing(enable)
        sum(m.square().mean() for m in maps(x)).backward()
        gradients.append([p.grad.clone() for p in maps.parameters()])
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(before, after)


class Bare(nn.Module):
    pass


def test_a_model_without_a_pyramid_is_refused():
    with pytest.raises(ValueError, match="Bare gives no feature maps"):
        FeatureMaps(Bare())
    halved = timm.create_model("resnet18")
    halved.feature_info = halved.feature_info[:4]
    with pytest.raises(ValueError, match=r"maps at strides \[2, 4, 8, 16\], none at \[32\]"):
        FeatureMaps(halved)
