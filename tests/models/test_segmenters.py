"""Heads for semantic segmentation: published sizes, shapes, equivalence with plain forms."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparse_mlp  # noqa: F401 - registers the models
from sparse_mlp.models.feature_maps import FeatureMaps
from sparse_mlp.models.segmenters import FcnHead, Segmenter, SemanticFpn, UperNet
from sparse_mlp.models.smp_segmenter import SmpSegmenter


def upernet(name: str, **args: object) -> Segmenter:
    maps = FeatureMaps(timm.create_model(name, **args))
    return Segmenter(maps, UperNet(maps.channels, 150), FcnHead(maps.channels[-2], 150))


@pytest.mark.parametrize(
    ("name", "args", "parameters", "macs"),
    [  # the AS-MLP repository's table for ADE20K: 60M 937G, 81M 1024G, 121M 1166G at 512 x 2048
        ("as_mlp_tiny", {}, 60, 937),
        ("as_mlp_small", {"shift_size": 3}, 81, 1024),
        ("as_mlp_base", {}, 121, 1166),
    ],
)
def test_upernet_has_the_published_size(name, args, parameters, macs):
    with torch.device("meta"):
        model = upernet(name, **args).eval()
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == parameters
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 512, 2048))
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.003)


def test_semantic_fpn_over_cycle_mlp_b1():
    with torch.device("meta"):
        maps = FeatureMaps(timm.create_model("cycle_mlp_b1"))
        model = Segmenter(maps, SemanticFpn(maps.channels, 150))
    assert sum(p.numel() for p in model.parameters()) == 18_910_070


@pytest.mark.parametrize("head", [UperNet, SemanticFpn])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_logits_have_the_size_of_the_image(head, norm):
    maps = FeatureMaps(timm.create_model("resnet18"))
    model = Segmenter(maps, head(maps.channels, 7, width=32, norm=norm), FcnHead(maps.channels[-2], 7))
    x = torch.randn(2, 3, 76, 100)
    logits, auxiliary = model(x, auxiliary=True)
    assert logits.shape == auxiliary.shape == (2, 7, 76, 100)
    (logits.mean() + auxiliary.mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(model.eval()(x), model(x, auxiliary=True)[0])


def test_semantic_fpn_is_the_sum_of_its_levels():
    """Without norm and activation every part is linear: written once more as Kirillov et al. draw it."""
    torch.manual_seed(0)
    head = SemanticFpn((8, 12, 16, 20), 3, width=4).eval()
    maps = [torch.randn(1, c, 32 // 2**i, 32 // 2**i) for i, c in enumerate((8, 12, 16, 20))]
    with torch.no_grad():
        inner = [conv[0](x) for conv, x in zip(head.pyramid.inner_blocks, maps, strict=True)]
        for i in (2, 1, 0):
            inner[i] = inner[i] + F.interpolate(inner[i + 1], scale_factor=2, mode="nearest")
        levels = [conv[0](x) for conv, x in zip(head.pyramid.layer_blocks, inner, strict=True)]
        total = torch.zeros(1, 4, 32, 32)
        for i, x in enumerate(levels):
            convolutions = [layer for layer in head.scales[i] if not isinstance(layer, nn.Upsample)]
            assert len(convolutions) == max(1, i)
            for conv in convolutions:
                x = conv(x)
                if i:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear")
            total += x
        torch.testing.assert_close(head(maps), head.classify(total))


@pytest.mark.parametrize("name", ["cycle_mlp_b1", "resnet18", "convnext_atto", "pvt_v2_b0"])
def test_smp_decoders_keep_the_backbones_weights(name):
    pytest.importorskip("segmentation_models_pytorch")
    model = timm.create_model(name).eval()
    segmenter = SmpSegmenter(model, name, "unet", 5).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert segmenter(x).shape == (1, 5, 64, 64)
        expected = model.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        torch.testing.assert_close(segmenter.body.encoder(x)[-1], expected)


def test_a_decoder_that_needs_dilation_says_so():
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(ValueError, match=r"smp_deeplabv3 cannot stand on cycle_mlp_b1: .*output_stride"):
        SmpSegmenter(timm.create_model("cycle_mlp_b1"), "cycle_mlp_b1", "deeplabv3", 5)
