"""Images and what is painted over them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from sparse_mlp.report.pictures import MAX_OPACITY, full_scale, overlays, paint, patterns_figure
from sparse_mlp.report.routing import ChannelRouting, PatchRouting
from sparse_mlp.report.samples import Samples, data_uri, example_rows, picture
from sparse_mlp.report.style import expert_colours


def test_picture_undoes_the_normalisation_and_grows_by_whole_pixels() -> None:
    pixels = np.array([[0.0, 1.0], [0.5, 0.25]])
    found = picture(torch.tensor((pixels - 0.3) / 0.2)[None], [0.3], [0.2], side=7)
    assert found.shape == (6, 6, 3)
    expected = np.round(255 * pixels).astype(np.uint8).repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(found, np.stack([expected] * 3, -1))


def test_picture_keeps_three_channels_apart_and_averages_others() -> None:
    rgb = picture(torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1), [0] * 3, [1] * 3, side=1)
    assert rgb.tolist() == [[[255, 0, 128]]]
    grey = picture(torch.tensor([1.0, 0.0]).view(2, 1, 1), [0] * 2, [1] * 2, side=1)
    assert grey.tolist() == [[[128, 128, 128]]]


def test_large_pictures_shrink_and_keep_their_shape() -> None:
    assert picture(torch.zeros(3, 200, 400), [0] * 3, [1] * 3, side=100).shape == (50, 100, 3)


def test_data_uri_holds_the_pixels() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    encoded = data_uri(pixels).removeprefix("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), pixels)


def test_paint_lays_each_patch_over_its_own_pixels() -> None:
    pixels = np.full((4, 4, 3), 255, np.uint8)
    colours = np.array([[[1.0, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]])
    found = paint(pixels, colours, np.array([[1.0, 0.0], [0.5, 1.0]]))
    white = round(255 * 0.75)
    assert found[0, 1].tolist() == [255, 0, 0]
    assert found[1, 2].tolist() == [white] * 3  # opacity 0 shows the picture, in middle grey
    assert found[3, 0].tolist() == [round(255 * 0.375)] * 2 + [round(255 * 0.875)]
    assert found[2, 3].tolist() == [0, 0, 0]


def test_paint_covers_pictures_that_no_grid_divides() -> None:
    found = paint(np.zeros((5, 7, 3), np.uint8), np.ones((2, 3, 3)), np.ones((2, 3)))
    assert (found == 255).all()


def test_overlay_colours_the_patch_by_its_dominant_expert() -> None:
    shares = np.zeros((1, 4, 3))
    shares[0, range(4), [2, 0, 1, 2]] = 1
    layer = PatchRouting("a", shares, exact=True)
    (found,) = overlays(layer, [np.zeros((4, 4, 3), np.uint8)], (2, 2))
    colour = np.array([to_rgb(c) for c in expert_colours(3)])
    for patch, expert in enumerate([2, 0, 1, 2]):
        expected = 255 * (MAX_OPACITY * colour[expert] + (1 - MAX_OPACITY) * 0.3)
        np.testing.assert_allclose(found[2 * (patch // 2), 2 * (patch % 2)], expected, atol=0.51)


def test_full_opacity_from_the_strongest_tenth_on() -> None:
    share = 0.5 + np.linspace(-0.1, 0.1, 101)
    layer = PatchRouting("a", np.stack([share, 1 - share], -1)[None], exact=False)
    strengths = np.abs(share - 0.5)
    assert full_scale(layer) == pytest.approx(np.quantile(strengths, 0.9))
    assert full_scale(PatchRouting("a", layer.shares, exact=True)) == 1


def test_an_expert_without_channels_has_no_pattern_but_is_named() -> None:
    patterns = np.array([[0.1, -0.1, 0, 0], [np.nan] * 4])
    figure = patterns_figure(ChannelRouting("a", np.zeros((1, 2, 2)), patterns), (2, 2))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "none" in texts and "1" in texts


def test_examples_are_one_per_class_and_fixed_by_the_seed() -> None:
    targets = np.array([2, 0, 1, 2, 0, 1])
    rows = example_rows(targets, seed=3)
    assert targets[rows].tolist() == [0, 1, 2]
    assert rows == example_rows(targets, seed=3)
    assert len({tuple(example_rows(targets, seed)) for seed in range(10)}) > 1
    assert len(example_rows(np.arange(50), 0)) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 8, 8)}, r"samples need images \(N, C, H, W\)"),
        ({"targets": torch.zeros(3)}, r"samples need images \(N, C, H, W\)"),
        ({"mean": (0.5,)}, "3 channels need as many means and stds; got 1 and 3"),
    ],
)
def test_samples_that_do_not_fit(change: dict[str, object], message: str) -> None:
    given = {"images": torch.zeros(2, 3, 8, 8), "targets": torch.zeros(2), "index": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        Samples(**{**given, "mean": (0.5,) * 3, "std": (0.5,) * 3, **change})  # type: ignore[arg-type]
