from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.data.augment import DRAWS, BatchAugment, eval_transform, normalize, resize, train_transform
from sparse_mlp.data.randomness import seed_generators

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
X, Y, FLIP, ANGLE, AREA, RATIO, _, ERASE, ERASE_AREA, ERASE_RATIO, ERASE_X, ERASE_Y = range(DRAWS)


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


def test_resized_crop_of_a_quarter_is_that_quarter_enlarged():
    batch = images()
    config = AugmentConfig(crop_scale=(0.25, 0.25))
    result = pixels(config, batch, draws(X=0.0, Y=1.0))  # the lower left quarter
    naive = torch.nn.functional.interpolate(batch[..., 4:, :4].float(), (8, 8), mode="bilinear")
    assert_close(result[..., 1:-1, 1:-1], naive[..., 1:-1, 1:-1], atol=1e-2, rtol=0)  # edges see their neighbours


def test_erase_covers_the_drawn_rectangle_and_no_more():
    batch, config = images(size=16), AugmentConfig(erase=1.0)
    table = draws(ERASE_AREA=1.0, ERASE_RATIO=0.5, ERASE_X=0.0, ERASE_Y=0.0)
    varied, plain = BatchAugment(config, 16, MEAN, STD)(batch, table), normalize(batch, MEAN, STD)
    side = round(16 * (1 / 3) ** 0.5)
    assert (varied[..., :side, :side] == 0).all()
    varied[..., :side, :side] = plain[..., :side, :side]
    assert torch.equal(varied, plain)


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AugmentConfig(pad=1, crop_scale=(0.5, 1)), "set one of them"),
        (AugmentConfig(color_jitter=0.4), "color_jitter"),
        (AugmentConfig(auto_augment="rand-q9"), "rand-q9"),
        (AugmentConfig(auto_augment="nonsense"), "nonsense"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: AugmentConfig, message: str):
    with pytest.raises(ValueError, match=message) as error:
        BatchAugment(config, 8, MEAN, STD)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "v0"])
def test_full_strength_posterize_keeps_a_bit(policy: str):
    """timm asks Pillow for 0 bits there; Pillow 13 refuses."""
    config = AugmentConfig(auto_augment=policy)
    varied = BatchAugment(config, 8, MEAN, STD)(images(200), draws(200))
    assert varied.isfinite().all()
    transform = train_transform(DataConfig(name="folder"), config, 8, MEAN, STD)
    picture = Image.fromarray(images(1)[0].permute(1, 2, 0).numpy())
    for seed in range(200):
        seed_generators(seed)
        assert transform(picture).shape == (3, 8, 8)


def test_policies_need_colour():
    with pytest.raises(ValueError, match="colour"):
        BatchAugment(AugmentConfig(auto_augment="rand-m9"), 8, (0.5,), (0.2,))


@pytest.mark.parametrize("config", [AugmentConfig(pad=1), AugmentConfig(rotate=5)])
def test_file_sets_refuse_what_only_sets_in_memory_know(config: AugmentConfig):
    with pytest.raises(ValueError, match="sets in memory"):
        train_transform(DataConfig(name="folder"), config, 32, MEAN, STD)


def test_evaluating_a_file_equals_evaluating_the_array():
    """What `predict` does with a saved image is what the evaluation does with the same pixels in memory."""
    batch = images(1, 32)
    picture = Image.fromarray(batch[0].permute(1, 2, 0).numpy())
    assert_close(eval_transform(32, MEAN, STD, 1.0)(picture), normalize(resize(batch, 32), MEAN, STD)[0])
