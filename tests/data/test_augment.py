from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets
from sparse_mlp.data.augment import DRAWS, BatchAugment, eval_transform, normalize, resize, train_transform
from sparse_mlp.data.randomness import seed_generators
from sparse_mlp.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
X, Y, FLIP, ANGLE = range(4)


def images(count: int = 6, size: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def draws(count: int = 6, **columns: float) -> np.ndarray:
    table = np.random.default_rng(1).random((count, DRAWS), dtype=np.float32)
    for name, value in columns.items():
        table[:, globals()[name]] = value
    return table


def pixels(config: AugmentConfig, batch: torch.Tensor, table: np.ndarray, size: int = 8) -> torch.Tensor:
    """The augmented batch, brought back to 0..255."""
    varied = BatchAugment(config, size, MEAN, STD)(batch, table)
    return (varied * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def test_normalize_has_mean_and_deviation_of_the_set():
    batch = images()
    naive = (batch.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert_close(normalize(batch, MEAN, STD), naive.float())


def test_pad_and_flip_equal_slicing():
    batch, table, pad = images(), draws(), 3
    padded = torch.nn.functional.pad(batch, (pad,) * 4).float()
    expected = []
    for image, row in zip(padded, table, strict=True):
        dx, dy = int(row[X] * 7), int(row[Y] * 7)
        crop = image[:, dy : dy + 8, dx : dx + 8]
        expected.append(crop.flip(-1) if row[FLIP] < 0.5 else crop)
    result = pixels(AugmentConfig(pad=pad, flip=0.5), batch, table)
    assert_close(result, torch.stack(expected), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("draw", "turns"), [(0.0, -1), (0.5, 0), (1.0, 1)])
def test_rotation_turns_about_the_centre(draw: float, turns: int):
    batch = images()
    result = pixels(AugmentConfig(rotate=90), batch, draws(ANGLE=draw))
    # Where a rotated corner lands a rounding error outside the image, a sliver of the black outside mixes in.
    assert_close(result, torch.rot90(batch.float(), turns, (-2, -1)), atol=0.05, rtol=0)


def test_pad_counts_pixels_of_the_model():
    """Images of 8 pixels shown on 16: a shift by 2 of 16 is one by 1 of 8."""
    shifted = pixels(AugmentConfig(pad=2), images(), draws(X=0.99, Y=0.5), size=16)
    expected = resize(torch.nn.functional.pad(images()[..., 1:], (0, 1)), 16)
    inside = (..., slice(2, -2), slice(2, -3))  # at its edges the image runs into the black outside
    assert_close(shifted[inside], expected[inside], atol=1e-2, rtol=0)


def test_resized_crops_are_parts_of_the_image_enlarged():
    """On a ramp a crop of a quarter of the area is a ramp half as steep, anywhere within the image's values."""
    ramp = torch.arange(16) * 10 + 5
    image = torch.stack((ramp.expand(16, 16), ramp.expand(16, 16).T, torch.zeros(16, 16))).byte()
    result = pixels(AugmentConfig(crop_scale=(0.25, 0.25)), image.expand(500, -1, -1, -1), draws(500), size=16)
    inside = result[..., 1:-1, 1:-1]  # at an image's edge there is no neighbour to interpolate with
    assert_close(inside[:, 0].diff(dim=-1), torch.full((500, 14, 13), 5.0), atol=1e-2, rtol=0)
    assert_close(inside[:, 1].diff(dim=-2), torch.full((500, 13, 14), 5.0), atol=1e-2, rtol=0)
    for middle in (result[:, 0, :, 7:9].mean((1, 2)), result[:, 1, 7:9].mean((1, 2))):
        assert 38 < middle.min() < 45 and 115 < middle.max() < 122 and middle.mean() == pytest.approx(80, abs=4)


def test_erase_covers_a_rectangle_and_no_more():
    batch, config = images(200, size=16), AugmentConfig(erase=1.0)
    varied, plain = BatchAugment(config, 16, MEAN, STD)(batch, draws(200)), normalize(batch, MEAN, STD)
    for image, before in zip(varied, plain, strict=True):
        erased = (image == 0).all(0)
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        box = torch.zeros_like(erased)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert torch.equal(box, erased) and torch.equal(image[:, ~box], before[:, ~box])
        assert 0.01 < box.float().mean() < 0.4


def test_erase_probability_counts_images():
    varied = BatchAugment(AugmentConfig(erase=0.25), 8, MEAN, STD)(images(400), draws(400))
    erased = (varied == 0).all(1).flatten(1).any(1).float().mean()
    assert 0.18 < erased < 0.32


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(pad=2, flip=0.5, rotate=15, erase=0.5),
        AugmentConfig(crop_scale=(0.2, 1), crop_ratio=(0.75, 4 / 3), flip=0.5),
        AugmentConfig(pad=2, auto_augment="rand-m9-mstd0.5-inc1"),
        AugmentConfig(rotate=20, color_jitter=0.4),
    ],
)
@pytest.mark.parametrize("size", [8, 12, 5])
def test_an_image_does_not_depend_on_its_batch(config: AugmentConfig, size: int):
    batch, table = images(7), draws(7)
    augment = BatchAugment(config, size, MEAN, STD)
    together = augment(batch, table)
    assert together.shape == (7, 3, size, size)
    for i in range(7):
        assert torch.equal(together[i], augment(batch[i : i + 1], table[i : i + 1])[0])


def picture_of(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(pad=3),
        AugmentConfig(rotate=60),
        AugmentConfig(flip=0.3),
        AugmentConfig(crop_scale=(0.2, 0.9), crop_ratio=(0.6, 1.5)),
        AugmentConfig(color_jitter=0.8),
        AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1"),
        AugmentConfig(erase=0.7),
        AugmentConfig(pad=2, rotate=30, flip=0.5, color_jitter=0.4, erase=0.5),
    ],
    ids=str,
)
def test_images_in_memory_and_in_files_are_varied_alike(config: AugmentConfig):
    """An option does the same to every set: the same mean and deviation of every pixel over many epochs.

    Towards the edges a little more may differ: Pillow and torch treat an image's outermost half pixel differently.
    """
    count, size, ramp = 2000, 20, torch.linspace(40, 220, 20)
    across = ramp.expand(size, size)
    image = torch.stack((across, across.T, across.flip(1))).byte()
    memory = BatchAugment(config, size, MEAN, STD)(image.expand(count, -1, -1, -1), draws(count))
    transform, read = train_transform(config, size, MEAN, STD), []
    for seed in range(count):
        seed_generators(seed)
        read.append(transform(picture_of(image)))
    for statistic in (torch.mean, torch.std):
        difference = (statistic(memory, 0) - statistic(torch.stack(read), 0)).abs()
        assert difference.mean() < 0.1 and difference[:, 5:15, 5:15].max() < 0.15


@pytest.fixture(params=["memory", "files"])
def build(request: pytest.FixtureRequest, make_folder: Callable[..., Path]) -> Callable[[AugmentConfig], object]:
    """Builds a set of either kind, its images 8 pixels wide."""
    if request.param == "memory":
        return lambda augment: build_datasets(DataConfig(), augment)
    folder = make_folder("photos")
    return lambda augment: build_datasets(
        DataConfig(name="folder", root=str(folder), image_size=8, channels=1, mean=(0.5,), std=(0.2,)), augment
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AugmentConfig(pad=1, crop_scale=(0.5, 1)), "set one of them"),
        (AugmentConfig(pad=1, crop_ratio=(0.5, 1)), "set one of them"),
        (AugmentConfig(pad=9), "augment.pad 9 is more than the image's side, 8"),
        (AugmentConfig(pad=1_000_000), "augment.pad 1000000 is more than the image's side, 8"),
        (AugmentConfig(rotate=1e6), "augment.rotate 1000000.0 must be at least 0 and at most 180"),
        (AugmentConfig(color_jitter=1e6), "augment.color_jitter 1000000.0 must be at least 0 and at most 1"),
        (AugmentConfig(crop_scale=(1e-9, 1)), "augment.crop_scale 1e-09 must be at least 0.01 and at most 1"),
        (AugmentConfig(crop_ratio=(1, 1e9)), "augment.crop_ratio 1000000000.0 must be at least 0.1 and at most 10"),
        (AugmentConfig(color_jitter=0.4, auto_augment="rand-m9"), "set one of them"),
        (AugmentConfig(auto_augment="rand-m9"), "needs colour images"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(build: Callable[[AugmentConfig], object], config: AugmentConfig, message):
    with pytest.raises(UserError, match=message) as error:
        build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["rand-q9", "nonsense"])
def test_unknown_policies_are_named(policy: str):
    for builder in (BatchAugment, train_transform):
        with pytest.raises(UserError, match=policy) as error:
            builder(AugmentConfig(auto_augment=policy), 8, MEAN, STD)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_strongest_settings_that_are_accepted_run(size: int):
    config = AugmentConfig(crop_scale=(0.01, 1), crop_ratio=(0.1, 10), rotate=180, color_jitter=1, flip=1, erase=1)
    for strongest in (config, AugmentConfig(pad=size, rotate=180)):
        assert BatchAugment(strongest, size, MEAN, STD)(images(50, size), draws(50)).isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "v0"])
def test_full_strength_posterize_keeps_a_bit(policy: str):
    """timm asks Pillow for 0 bits there; Pillow 13 refuses."""
    config = AugmentConfig(auto_augment=policy)
    varied = BatchAugment(config, 8, MEAN, STD)(images(200), draws(200))
    assert varied.isfinite().all()
    transform, picture = train_transform(config, 8, MEAN, STD), picture_of(images(1)[0])
    for seed in range(200):
        seed_generators(seed)
        assert transform(picture).shape == (3, 8, 8)


def test_evaluating_a_file_equals_evaluating_the_array():
    """What `predict` does with a saved image is what the evaluation does with the same pixels in memory."""
    batch = images(1, 32)
    assert_close(eval_transform(32, MEAN, STD, 1.0)(picture_of(batch[0])), normalize(resize(batch, 32), MEAN, STD)[0])
