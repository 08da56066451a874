from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from sparse_mlp.data import (
    AugmentConfig,
    DataConfig,
    ImageData,
    ViewsConfig,
    build_datasets,
    eval_loader,
    in_two_views,
    view_loader,
)
from sparse_mlp.data.randomness import preserved_generators, seed_generators
from sparse_mlp.data.view_transforms import (
    VIEW_DRAWS,
    BatchView,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    view_transform,
)
from sparse_mlp.errors import UserError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
GREY = {"saturation": 0.0, "hue": 0.0, "grey": 0.0}
OFF = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": (0.0, 0.0)}


def build_views(data: DataConfig, views: ViewsConfig) -> ImageData:
    return in_two_views(build_datasets(data, AugmentConfig()), views)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def pixels(count: int = 64, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draws(count: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, VIEW_DRAWS), dtype=np.float32)


def test_colour_operations_are_torchvisions_with_a_number_an_image(images):
    factors = torch.tensor([0.6, 0.9, 1.0, 1.2, 1.4])
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.3])
    for ours, library, numbers in (
        (adjust_brightness, tv.adjust_brightness, factors),
        (adjust_contrast, tv.adjust_contrast, factors),
        (adjust_saturation, tv.adjust_saturation, factors),
        (adjust_hue, tv.adjust_hue, turns),
    ):
        expected = torch.cat([library(images[i : i + 1], number) for i, number in enumerate(numbers.tolist())])
        torch.testing.assert_close(ours(images, numbers), expected, rtol=1e-4, atol=1e-5)
    grey = torch.full((2, 3, 4, 4), 0.3)
    torch.testing.assert_close(adjust_hue(grey, torch.tensor([0.1, 0.4])), grey)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_scale": (0.2, 0.9), "crop_ratio": (0.6, 1.5)},
        {"rotate": 40.0},
        {"rotate": 40.0, "crop_scale": (0.3, 1.0)},
        {"jitter": 0.8, "brightness": 0.8, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
        {"jitter": 1.0, "hue": 0.3},
        {"grey": 0.5},
        {"blur": (1.0, 1.0)},
        {"solarize": (0.5, 0.5)},
    ],
    ids=str,
)
def test_images_in_memory_and_in_files_are_varied_alike(options):
    """An option does the same to every set: the same mean and deviation of every pixel over many epochs."""
    count, size = 1200, 20
    across = torch.linspace(40, 220, size).expand(size, size)
    image = torch.stack((across, across.T, across.flip(1))).byte()
    views = ViewsConfig(**{**OFF, "solarize": (0.0, 0.0), **options})
    with preserved_generators():
        memory = BatchView(views, 1, size, **PLAIN)(image.expand(count, -1, -1, -1), draws(count))
        transform, read = view_transform(views, 1, size, **PLAIN), []
        for seed in range(count):
            seed_generators(seed)
            read.append(transform(image))
    for statistic in (torch.mean, torch.std):
        difference = (statistic(memory, 0) - statistic(torch.stack(read), 0)).abs()
        assert difference.mean() < 0.015 and difference.max() < 0.045


def test_an_image_depends_on_its_own_draws_alone():
    view = BatchView(ViewsConfig(blur=(0.5, 0.1)), 0, 16, **PLAIN)
    together = view(pixels(), draws())
    for i in (0, 7, 63):
        torch.testing.assert_close(view(pixels()[i : i + 1], draws()[i : i + 1])[0], together[i])


def test_the_global_generators_are_left_alone():
    data, config = digits()
    before = torch.get_rng_state(), random.getstate()
    next(iter(view_loader(data, config, 0, steps=1)))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_every_operation_has_its_share():
    count, whole = 4000, pixels(1, 4).expand(4000, -1, -1, -1)
    plain = BatchView(ViewsConfig(**OFF, solarize=(0.0, 0.0)), 0, 4, **PLAIN)(whole, draws(count))
    torch.testing.assert_close(plain * 255, whole.float(), rtol=0, atol=1e-3)
    blur = {"blur": (1.0, 0.1), "blur_sigma": (1.0, 2.0)}
    for option, number, share in (
        ({"jitter": 0.8}, 0, 0.8),
        ({"grey": 0.2}, 0, 0.2),
        (blur, 0, 1.0),
        (blur, 1, 0.1),
        ({"solarize": (0.0, 0.2)}, 0, 0.0),
        ({"solarize": (0.0, 0.2)}, 1, 0.2),
        ({"flip": 0.5}, 0, 0.5),
    ):
        config = ViewsConfig(**{**OFF, "solarize": (0.0, 0.0), **option})
        changed = BatchView(config, number, 4, **PLAIN)(whole, draws(count))
        found = ((changed - plain).abs().amax((1, 2, 3)) > 1e-3).float().mean().item()
        assert found == pytest.approx(share, abs=0.03), (option, number)


def test_solarised_values_are_inverted_from_128_on():
    config = ViewsConfig(**{**OFF, "solarize": (1.0, 0.0)})
    image = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    found = BatchView(config, 0, 2, **PLAIN)(image, draws(1))[0, 0].flatten() * 255
    torch.testing.assert_close(found, torch.tensor([0.0, 127.0, 127.0, 0.0]), atol=1e-3, rtol=0)


def digits(**options) -> tuple:
    config = DataConfig(batch_size=64, **options)
    return build_views(config, ViewsConfig(**GREY)), config


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_batches_are_a_function_of_the_step():
    data, config = digits()
    whole = list(view_loader(data, config, 3, steps=25))  # 18 steps an epoch
    assert set(whole[0]) == {"view1", "view2", "target", "index"}
    assert not torch.equal(whole[0]["view1"], whole[0]["view2"])
    again, with_workers = digits(workers=2)
    later = list(view_loader(again, with_workers, 3, start_step=16, steps=9))
    assert all(same(one, other) for one, other in zip(whole[16:], later, strict=True))
    halves = [next(iter(view_loader(data, config, 3, start_step=20, steps=1, rank=r, world_size=2))) for r in (0, 1)]
    assert same(whole[20], {name: torch.cat([half[name] for half in halves]) for name in whole[20]})
    other_seed = next(iter(view_loader(data, config, 4, steps=1)))
    assert not torch.equal(other_seed["view1"], whole[0]["view1"])
    assert set(next(iter(eval_loader(data, config)))) == {"image", "target", "index"}


def test_files_are_read_in_two_views(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(8):
            values = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    config = DataConfig(name="folder", root=str(tmp_path), image_size=24, batch_size=4, workers=1)
    data = build_views(config, ViewsConfig(rotate=10))
    one, two = (list(view_loader(data, config, 0, start_step=s, steps=6 - s)) for s in (0, 4))
    assert one[0]["view1"].shape == one[0]["view2"].shape == (4, 3, 24, 24)
    assert same(one[4], two[0]) and not torch.equal(one[0]["view1"], one[0]["view2"])
    state = torch.get_rng_state()
    alone = data.train.batch([one[0]["index"][1].item()], (0, 0))
    assert torch.equal(alone["view2"][0], one[0]["view2"][1])
    assert torch.equal(state, torch.get_rng_state())
    assert data.train.batch([0])["image"].shape == (1, 3, 24, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"views.flip 1.5 is not in \[0, 1\]"),
        ({"blur": (1.0, -0.1)}, "views.blur"),
        ({"hue": 0.7}, "views.hue 0.7"),
        ({"brightness": -1.0}, r"views.brightness -1.0 is not in \[0, 1\]"),
        ({"contrast": 1e6}, r"views.contrast 1000000.0 is not in \[0, 1\]"),
        ({"rotate": 1e6}, r"views.rotate 1000000.0 is not in \[0, 180\]"),
        ({"rotate": float("nan")}, r"views.rotate nan is not in \[0, 180\]"),
        ({"crop_scale": (0.5, 0.2)}, "views.crop_scale"),
        ({"crop_scale": (1e-9, 1.0)}, "views.crop_scale"),
        (
            {"crop_ratio": (1.0, 1e9)},
            r"views.crop_ratio \(1.0, 1000000000.0\) must be two rising numbers in \[0.1, 10\]",
        ),
        ({"blur_sigma": (1.0, 1e9)}, "views.blur_sigma"),
        ({"blur": (0.0, 0.0), "blur_sigma": (0.1, 1.0)}, "would be ignored"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ViewsConfig(**options)


def test_options_that_a_set_would_ignore_are_errors(tmp_path):
    with pytest.raises(ValueError, match="for colour images"):
        build_views(DataConfig(), ViewsConfig())
