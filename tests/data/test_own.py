"""A user's own dataset of (image, label)."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sparse_mlp.data import (
    AugmentConfig,
    Batch,
    DataConfig,
    ImageData,
    eval_loader,
    image_data_from,
    steps_per_epoch,
    train_loader,
)
from sparse_mlp.data.views import ViewsConfig, in_two_views, view_loader
from sparse_mlp.errors import UserError

CONFIG = DataConfig(batch_size=4, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "pil": Image.fromarray,
    "array": np.asarray,
    "tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    "tv image": lambda pixels: v2.functional.to_image(pixels),
}


class Own(Dataset):
    def __init__(self, make: Callable[[np.ndarray], Any] = Image.fromarray, count: int = 20, classes: int = 3) -> None:
        self.make, self.count, self.number = make, count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.make(PIXELS[index]), index % self.number


def build(train: Any = None, test: Any = None, config: DataConfig = CONFIG, **augment) -> ImageData:
    return image_data_from(train or Own(), test or Own(), config=config, augment=AugmentConfig(**augment))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


@pytest.mark.parametrize("form", FORMS)
def test_images_in_any_form_are_the_same_images(form: str):
    data = build(Own(FORMS[form]), Own(FORMS[form]))
    assert (data.spec.channels, data.spec.image_size, data.classes) == (3, 16, ["0", "1", "2"])
    batch = next(iter(eval_loader(data, CONFIG)))
    assert torch.equal(batch["image"], torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255)
    assert batch["target"].tolist() == [i % 3 for i in range(20)]


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels: pixels[..., 0],
        lambda pixels: pixels[..., :1],
        lambda pixels: torch.from_numpy(pixels[..., 0])[None],
        lambda pixels: Image.fromarray(pixels[..., 0]),
        lambda pixels: Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
    ],
)
def test_grey_images(make: Callable[[np.ndarray], Any]):
    data = image_data_from(Own(make), Own(make), config=DataConfig(mean=(0.0,), std=(1.0,), crop_pct=1.0))
    assert data.spec.channels == 1
    image = data.test.batch([4])["image"]
    assert torch.equal(image[0, 0], torch.from_numpy(PIXELS[4, ..., 0]) / 255)


def test_class_names():
    named = Own()
    named.classes = ["a", "b", "c"]
    assert image_data_from(named, Own()).classes == ["a", "b", "c"]
    assert image_data_from(named, Own(), classes=["x", "y", "z"]).classes == ["x", "y", "z"]
    assert image_data_from(Own(), Own(), config=DataConfig(num_classes=5)).classes == ["0", "1", "2", "3", "4"]
    assert image_data_from(Subset(Own(), [0]), Own(classes=4)).classes == ["0", "1", "2", "3"]
    tensors = TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.arange(20) % 5)
    assert len(image_data_from(tensors, tensors).classes) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_are_functions_of_seed_and_step(workers: int):
    """Also what the dataset draws itself."""

    class Random(Own):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            shift = int(torch.randint(9, ())) + random.randrange(9) + int(np.random.randint(9))  # noqa: NPY002
            return Image.fromarray(np.roll(PIXELS[index], shift, 0)), 0

    options = {"crop_scale": (0.5, 1.0), "flip": 0.5, "mixup": 0.3}
    whole = list(train_loader(build(Random(), **options), CONFIG, 3, steps=11))
    assert len({batch["image"].sum().item() for batch in whole}) == 11
    config = DataConfig(batch_size=4, workers=workers)
    again = build(Random(), **options)
    assert same(whole[6:], list(train_loader(again, config, 3, start_step=6, steps=5)))
    assert steps_per_epoch(again, config) == 5


def test_images_of_different_sizes_and_a_size_of_choice():
    def cut(pixels: np.ndarray) -> np.ndarray:
        return pixels[: 8 + pixels[0, 0, 0] % 8]

    batch = build(Own(cut), config=DataConfig(image_size=24)).train.batch([0, 1, 2], (0, 0))
    assert batch["image"].shape == (3, 3, 24, 24)


def test_two_views():
    data = in_two_views(build(), ViewsConfig())
    (batch,) = view_loader(data, CONFIG, 0, steps=1)
    assert batch["view1"].shape == (4, 3, 16, 16) and not torch.equal(batch["view1"], batch["view2"])


def test_a_share_of_the_labels():
    data = build(config=DataConfig(label_share=0.5))
    assert sorted(data.train.batch(range(len(data.train)))["target"].tolist()) == [0] * 4 + [1] * 4 + [2] * 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "config", "message"),
    [
        (Stream(), CONFIG, "has to have a length and items by index"),
        ([], CONFIG, "the train dataset is empty"),
        ([1], CONFIG, r"has to be \(image, label\), not int"),
        (Own(lambda p: torch.zeros(3, 8, 8)), CONFIG, "image 0 is Tensor of .*float32"),
        (Own(lambda p: p[:0]), CONFIG, "image 0 is empty: 16 x 0 pixels"),
        (Own(lambda p: Image.new("L", (0, 0))), CONFIG, "image 0 is empty: 0 x 0 pixels"),
        (Own(lambda p: None), CONFIG, "image 0 is NoneType"),
        (Own(lambda p: "x.png"), CONFIG, "image 0 is str"),
        (Own(lambda p: p.astype(float)), CONFIG, "image 0 is ndarray of float64"),
        (Own(), DataConfig(root="x"), "data.root 'x' would be ignored"),
        (Own(), DataConfig(download=True), "data.download True would be ignored"),
        (Own(), DataConfig(test_share=0.5), "data.test_share 0.5 would be ignored"),
        (Own(), DataConfig(num_samples=3), "data.num_samples 3 would be ignored"),
        (Own(), DataConfig(label_seed=3), "data.label_seed 3 would be ignored"),
        (Own(), DataConfig(batch_size=0), "data.batch_size 0 must be at least 1"),
    ],
)
def test_what_does_not_work_is_one_line(dataset: Any, config: DataConfig, message: str):
    with pytest.raises((UserError, OSError), match=message) as error:
        image_data_from(dataset, Own(), config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "the label of image 0 is 3; the classes of the set are 0 to 2"),
        (-1, "the label of image 0 is -1"),
        (0.5, "the label of image 0 is 0.5, not an integer"),
    ],
)
def test_labels_that_are_no_class(label: Any, message: str):
    data = image_data_from([(PIXELS[0], label)], [(PIXELS[0], label)], classes=["a", "b", "c"], config=CONFIG)
    with pytest.raises(UserError, match=message):
        list(eval_loader(data, CONFIG))


@pytest.mark.parametrize("label", [0.5, -1, "cat", None, torch.eye(3)[0], 10**9, float("nan")])
def test_labels_that_are_no_numbers_of_classes(label: Any):
    """Without names of classes they are counted by the labels."""
    with pytest.raises(UserError, match=r"not a whole number from 0 on|more classes than a classifier has"):
        image_data_from([(PIXELS[0], 0), (PIXELS[0], label)], [(PIXELS[0], 0)], config=CONFIG)


@pytest.mark.parametrize("item", [(PIXELS[0], 0, 0), {"image": PIXELS[0], "label": 0}, (PIXELS[0],)])
def test_items_that_become_something_else_later(item: Any):
    data = image_data_from([(PIXELS[0], 0), item], [(PIXELS[0], 0)], classes=["a", "b"], config=CONFIG)
    with pytest.raises(UserError, match=r"has to be \(image, label\), not"):
        data.train.batch([1])


@pytest.mark.parametrize("label", [np.int64(2), torch.tensor(2), np.uint8(2)])
def test_labels_of_any_integer_type(label: Any):
    data = image_data_from([(PIXELS[0], label)] * 2, [(PIXELS[0], label)], config=CONFIG)
    assert data.train.batch([1])["target"].tolist() == [2] and len(data.classes) == 3


def test_files_of_torchvisions_folders_keep_their_names(make_folder: Callable[..., Path]):
    root = make_folder("set")
    folder = ImageFolder(str(root))
    data = image_data_from(Subset(folder, [1, 6]), folder, classes=folder.classes)
    assert [data.train.file_name(i) for i in range(2)] == ["cat/01.png", "dog/02.png"]
    assert data.test.file_name(7) == "dog/03.png" and data.test.channels == 3
    part = image_data_from(folder, folder, config=DataConfig(label_share=0.5)).train
    assert {part.file_name(i).split("/")[0] for i in range(len(part))} == {"cat", "dog"} and len(part) == 4


def test_worker_processes_by_spawn():
    data = pickle.loads(pickle.dumps(build(TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4)))))
    assert data.train.batch([1])["image"].shape == (1, 3, 8, 8)
