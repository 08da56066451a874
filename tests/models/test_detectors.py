"""torchvision's detectors over feature maps: sizes as published, images of any size, what they return."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparse_mlp  # noqa: F401 - registers the models
from sparse_mlp.models.detectors import DETECTORS, Detector, paste_masks
from sparse_mlp.models.feature_maps import FeatureMaps


def small(name="retinanet", **options):
    torch.manual_seed(0)
    model = timm.create_model("cycle_mlp_b1", depths=[1, 1, 1, 1], dims=[16, 24, 32, 48])
    return Detector(FeatureMaps(model), name, 3, fpn_channels=32, anchor_size=8, **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def of_meta(model, detector):
    """Parameters of a detector of COCO's 80 classes, in millions."""
    with torch.device("meta"):
        return parameters(Detector(FeatureMaps(timm.create_model(model)), detector, 80)) / 1e6


# Twelve convolutions of 256 channels for each of a thousand regions take half a minute.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name.startswith("cascade") else name for name in DETECTORS]


@pytest.mark.parametrize(
    ("model", "detector", "millions"),
    [
        ("as_mlp_tiny", "mask_rcnn", 48),
        ("as_mlp_small", "mask_rcnn", 69),
        ("as_mlp_tiny", "cascade_mask_rcnn", 86),
        ("as_mlp_small", "cascade_mask_rcnn", 107),
        ("as_mlp_base", "cascade_mask_rcnn", 145),
    ],
)
def test_sizes_are_those_of_the_authors_tables(model, detector, millions):
    """AS-MLP's table of COCO."""
    assert round(of_meta(model, detector)) == millions


def test_retinanet_over_cycle_mlp_b1_has_the_parameters_of_the_published_configuration():
    """The backbone without its classifier; pyramid and heads counted by hand from mmdetection's configuration."""
    width, anchors, classes = 256, 9, 80
    conv = width * width * 9 + width
    pyramid = sum(c * width + width for c in (128, 320, 512)) + 3 * conv + (512 * width * 9 + width) + conv
    heads = 8 * conv + (width * 9 + 1) * anchors * (classes + 4)
    backbone = parameters(timm.create_model("cycle_mlp_b1", num_classes=0))
    expected = backbone - 2 * 512 + sum(2 * c for c in (128, 320, 512)) + pyramid + heads
    assert of_meta("cycle_mlp_b1", "retinanet") * 1e6 == pytest.approx(expected, abs=0.5)
    assert round(expected / 1e6, 1) == 24.9


def multiply_adds(function):
    """Billions of multiply-adds, and the result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops() / 2e9, result


@pytest.mark.parametrize(("detector", "billions"), [("mask_rcnn", 260), ("cascade_mask_rcnn", 739)])
def test_multiply_adds_are_those_of_the_authors_table(detector, billions):
    """AS-MLP-T at 1,280 x 800 as mmdetection counts: 1,000 regions for the box heads, 100 for the mask heads."""
    with torch.device("meta"):
        net = Detector(FeatureMaps(timm.create_model("as_mlp_tiny")), detector, 80).eval().net
        image, regions, objects = (
            torch.empty(1, 3, 800, 1280),
            torch.empty(1000, 256, 7, 7),
            torch.empty(100, 256, 14, 14),
        )
    stages = getattr(net.roi_heads, "stages", [net.roi_heads])
    total, maps = multiply_adds(lambda: net.backbone(image))
    total += multiply_adds(lambda: net.rpn.head(list(maps.values())))[0]
    for stage in stages:
        total += multiply_adds(lambda stage=stage: stage.box_predictor(stage.box_head(regions)))[0]
        total += multiply_adds(lambda stage=stage: stage.mask_predictor(stage.mask_head(objects)))[0]
    assert total == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_different_sizes(name):
    detector = small(name)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 33)]
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4, 30, 30]]),
            "labels": torch.tensor([2]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    losses = detector(images, targets)
    assert all(value.isfinite() for value in losses.values())
    assert ("loss_mask" in losses) == detector.has_masks
    found = detector.eval()(images)
    for one, image in zip(found, images, strict=True):
        height, width = image.shape[1:]
        assert one["labels"].min() >= 0 and one["labels"].max() < 3 if len(one["labels"]) else True
        assert (one["boxes"][:, 2] <= width).all() and (one["boxes"][:, 3] <= height).all()
        assert ("masks" in one) == detector.has_masks
        if detector.has_masks:
            assert paste_masks(one["masks"], one["boxes"], (height, width)).shape == (len(one["boxes"]), height, width)


@pytest.mark.parametrize("objects", [1, 0])
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_a_gradient(name, objects):
    """Without one, training in several processes stops. Images without objects are allowed."""
    detector = small(name)
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([0]), "masks": torch.ones(1, 64, 64).byte()},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 64, 64).byte()},
    ]
    targets = targets if objects else targets[1:] * 2
    losses = detector([torch.rand(3, 64, 64)] * 2, targets)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("side", [32, 64, 160])
def test_bfloat16_has_finite_gradients(side):
    for seed in range(8):
        torch.manual_seed(seed)
        detector = small()
        target = {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([0])}
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector([torch.rand(3, side, side)] * 2, [target] * 2)
        sum(losses.values()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())


def test_a_model_of_one_size_gets_padded_images():
    model = timm.create_model("mixer_s16_224", img_size=64)
    detector = Detector(FeatureMaps(model), "retinanet", 3, fpn_channels=16).eval()
    assert len(detector([torch.rand(3, 40, 64)])) == 1
    with pytest.raises(ValueError, match="the model takes"):
        detector([torch.rand(3, 40, 80)])


def test_padding_changes_nothing_where_the_images_are_large_enough():
    """An image beside a larger one gives the losses of the image by itself only if the backbone looks at windows; the
    boxes stay within it in any case."""
    detector = small().eval()
    found = detector([torch.rand(3, 40, 40), torch.rand(3, 96, 96)])[0]
    assert (found["boxes"] <= 40).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown detector 'yolo'; known: mask_rcnn"):
        small("yolo")


def test_a_mask_lies_where_its_box_is():
    masks = paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([[10.0, 20, 30, 50]]), (60, 80))
    rows, columns = masks[0].nonzero().T
    assert [columns.min(), columns.max(), rows.min(), rows.max()] == pytest.approx([10, 30, 20, 50], abs=1)
