"""Segmentation: the loss, mean IoU as torchmetrics has it, windows, scales and flips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from sparse_mlp.errors import UserError
from sparse_mlp.tasks.segment import IGNORE, InferenceConfig, Segment, SegmentConfig, pixel_loss, segment_images


class Pixelwise(nn.Module):
    """Classes from each pixel's own colour, so that windows change nothing."""

    def __init__(self, fixed_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.fixed_size = fixed_size
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        self.sizes.append(tuple(x.shape[-2:]))
        logits = self.conv(x)
        return (logits, logits.flip(1)) if auxiliary else logits


NAMES = ["a", "b", "c", "d"]


def batch(seed: int = 0, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (count, 16, 16), generator=generator)
    target[:, :4] = IGNORE
    return {"image": torch.randn(count, 3, 16, 16, generator=generator), "target": target}


def test_the_loss_is_the_sum_over_counted_pixels_by_all_pixels():
    task, data = Segment(Pixelwise(), NAMES, SegmentConfig(auxiliary_weight=0.4)), batch()
    logits = task.model(data["image"])
    log_probabilities = logits.log_softmax(1), logits.flip(1).log_softmax(1)
    total = 0.0
    for i, y, x in np.argwhere(data["target"].numpy() != IGNORE):
        c = data["target"][i, y, x]
        total -= log_probabilities[0][i, c, y, x] + 0.4 * log_probabilities[1][i, c, y, x]
    torch.testing.assert_close(task(data)["loss"], total / data["target"].numel())


def test_microbatches_average_to_the_batch():
    """However many pixels of each count: what accumulation and ranks rely on."""
    data = batch(count=4)
    data["target"][0] = IGNORE
    logits = Pixelwise().conv(data["image"])
    parts = [pixel_loss(logits[i : i + 2], data["target"][i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, pixel_loss(logits, data["target"]))


def evaluation_batch(seed: int, sizes: list[tuple[int, int]]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for height, width in sizes:
        target = torch.randint(0, 3, (height, width), generator=generator)  # the last class is not there
        target[0] = IGNORE
        targets.append(target.to(torch.uint8))
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    return {"image": images, "target": targets, "index": torch.arange(len(sizes))}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40)), min_size=1, max_size=3))
def test_mean_iou_is_torchmetrics(seed, sizes):
    task, data = Segment(Pixelwise(), NAMES), evaluation_batch(seed, sizes)
    result = task.evaluate([data], torch.device("cpu"))
    iou = MulticlassJaccardIndex(4, ignore_index=IGNORE, average="macro")
    pixels = MulticlassAccuracy(4, ignore_index=IGNORE, average="micro")
    with torch.no_grad():
        for image, target in zip(data["image"], data["target"], strict=True):
            found = task.model(image[None]).argmax(1)
            iou.update(found, target[None].long())
            pixels.update(found, target[None].long())
    assert result.metrics["miou"] == pytest.approx(iou.compute().item(), abs=1e-6)
    assert result.metrics["pixel_accuracy"] == pytest.approx(pixels.compute().item(), abs=1e-6)
    assert result.metrics["images"] == len(sizes)
    assert np.array_equal(result.predictions["confusion"], iou.confmat.numpy())


def test_mean_iou_by_hand():
    task = Segment(Pixelwise(), NAMES)
    nn.init.zeros_(task.model.conv.weight)
    task.model.conv.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])  # everything is class 0
    target = torch.tensor([[0, 0, 1, IGNORE]], dtype=torch.uint8)
    data = {"image": [torch.zeros(3, 1, 4)], "target": [target], "index": torch.tensor([7])}
    result = task.evaluate([data], torch.device("cpu"))
    # class 0: 2 of 3, class 1: 0 of 1, the others are neither there nor predicted
    assert result.metrics == pytest.approx(
        {"miou": 1 / 3, "pixel_accuracy": 2 / 3, "class_accuracy": 1 / 2, "images": 1}
    )
    assert result.predictions["iou"] == pytest.approx([1 / 3])
    np.testing.assert_allclose(result.predictions["class_iou"], [2 / 3, 0, np.nan, np.nan])


def test_windows_change_nothing_where_pixels_are_alone():
    x = torch.randn(2, 3, 70, 101)
    whole, sliding = Pixelwise(), Pixelwise()
    expected = segment_images(whole, x, (70, 101), InferenceConfig())
    got = segment_images(sliding, x, (70, 101), InferenceConfig(window=48))
    torch.testing.assert_close(got, expected)
    assert set(sliding.sizes) == {(48, 48)} and len(sliding.sizes) == 2 * 3
    assert whole.sizes == [(96, 128)], "padded to the coarsest stride"
    torch.testing.assert_close(got.sum(1), torch.ones(2, 70, 101))


def test_a_model_of_one_size_slides_it():
    fixed = Pixelwise((64, 64))
    got = segment_images(fixed, x := torch.randn(1, 3, 40, 100), (40, 100), InferenceConfig())
    assert set(fixed.sizes) == {(64, 64)}
    torch.testing.assert_close(got, fixed.conv(x).softmax(1))


def test_scales_and_flips_are_averaged():
    x, model = torch.randn(1, 3, 32, 64), Pixelwise()
    got = segment_images(model, x, (16, 32), InferenceConfig(scales=(0.5, 1.0), flip=True))
    total = torch.zeros(1, 4, 16, 32)
    for size in ((16, 32), (32, 64)):
        scaled = F.interpolate(x, size=size, mode="bilinear")
        for flip in (False, True):
            logits = model.conv(scaled.flip(-1) if flip else scaled)
            logits = F.interpolate(logits, size=(16, 32), mode="bilinear")
            total += (logits.flip(-1) if flip else logits).softmax(1)
    torch.testing.assert_close(got, total / 4)


def test_nothing_to_evaluate_is_said():
    with pytest.raises(UserError, match="there are no images to evaluate on"):
        Segment(Pixelwise(), NAMES).evaluate([], torch.device("cpu"))
    data = evaluation_batch(0, [(4, 4)])
    data["target"] = [torch.full((4, 4), IGNORE, dtype=torch.uint8)]
    with pytest.raises(UserError, match="no pixel of the images to evaluate on has a class"):
        Segment(Pixelwise(), NAMES).evaluate([data], torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, "inference.window 8 is below 32"),
        ({"stride": 0.0}, "inference.stride 0.0 is not a share"),
        ({"scales": ()}, "inference.scales"),
    ],
)
def test_impossible_inference_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        InferenceConfig(**options)
