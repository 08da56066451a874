"""Images and what is painted over them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from sparse_mlp.report.pictures import channels_figure, full_scale, overlays, paint, patches_figure, patterns_figure
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


def test_paint_lays_a_square_in_the_middle_of_each_patch_with_the_given_area() -> None:
    pixels = np.full((40, 40, 3), 255, np.uint8)
    colours = np.array([[[1.0, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]])
    found = paint(pixels, colours, np.array([[1.0, 0.0], [0.25, 1.0]]))
    red, green, blue, black = ((found == np.array(c)).all(-1) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [0] * 3))
    pale = round(255 * 0.85)
    assert red.sum() == black.sum() == 16 * 16 and blue.sum() == 8 * 8 and green.sum() == 0
    assert red[2:18, 2:18].all() and blue[26:34, 6:14].all()
    assert found[5, 30].tolist() == [pale] * 3  # a patch without a square shows the picture, in pale grey


def test_paint_covers_pictures_that_no_grid_divides_and_small_ones_grow() -> None:
    found = paint(np.zeros((5, 7, 3), np.uint8), np.ones((2, 3, 3)), np.ones((2, 3)))
    assert found.shape == (25, 35, 3)
    assert {tuple(pixel) for pixel in found.reshape(-1, 3)} == {(255, 255, 255), (89, 89, 89)}


def test_the_colours_over_a_picture_are_those_of_the_legend() -> None:
    shares = np.zeros((1, 4, 3))
    shares[0, range(4), [2, 0, 1, 2]] = 1
    layer = PatchRouting("blocks.0.mlp_channels", shares, True, (2, 2))
    (found,) = overlays(layer, [np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)])
    coloured = {tuple(pixel) for pixel in found.reshape(-1, 3).tolist() if len(set(pixel)) > 1}
    figure = patches_figure([layer], [found], ["a"])
    legend = [text.get_color() for text in figure.texts if text.get_text() == "\N{BLACK SQUARE}"]
    assert coloured == {tuple(round(255 * part) for part in to_rgb(colour)) for colour in legend}
    assert legend == expert_colours(3)
    assert "expert" in [text.get_text() for text in figure.texts]
    centre = [found[10 + 20 * (patch // 2), 10 + 20 * (patch % 2)].tolist() for patch in range(4)]
    assert centre == [[round(255 * part) for part in to_rgb(expert_colours(3)[e])] for e in (2, 0, 1, 2)]


def test_class_names_are_whole_in_the_pictures() -> None:
    name = "greater_flamingo (Phoenicopterus roseus)"
    layer = PatchRouting("blocks.0.mlp_channels", np.full((2, 4, 2), 0.5), True, (2, 2))
    figure = patches_figure([layer], [np.zeros((8, 8, 3), np.uint8)] * 2, [name, "b"])
    heads = [axes.get_title() for axes in figure.axes]
    assert "".join(heads[0].split()) == "".join(name.split())
    assert max(map(len, heads[0].split("\n"))) <= 13


def test_the_picture_of_channels_shows_the_share_of_images() -> None:
    gates = np.zeros((2, 3, 2))
    gates[0, :, 0], gates[1, 0, 0], gates[1, 1:, 1] = 0.5, 0.5, 0.5
    axes = channels_figure(ChannelRouting("a", gates, np.zeros((2, 4)), (2, 2))).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[1, 0.5, 0.5], [0, 0.5, 0.5]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["expert 0", "expert 1"]
    assert [text.get_text() for text in axes.texts] == ["66.7 %", "33.3 %", "load"]


def test_the_largest_square_from_the_strongest_tenth_on() -> None:
    share = 0.5 + np.linspace(-0.1, 0.1, 101)
    layer = PatchRouting("a", np.stack([share, 1 - share], -1)[None], False, (1, 101))
    strengths = np.abs(share - 0.5)
    assert full_scale(layer) == pytest.approx(np.quantile(strengths, 0.9))
    assert full_scale(PatchRouting("a", layer.shares, True, (1, 101))) == 1


def test_an_expert_without_channels_has_no_pattern_but_is_named() -> None:
    patterns = np.array([[0.1, -0.1, 0, 0], [np.nan] * 4])
    figure = patterns_figure(ChannelRouting("a", np.zeros((1, 2, 2)), patterns, (2, 2)))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "none" in texts and "expert 1" in texts


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
