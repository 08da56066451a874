from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

from sparse_mlp.data import SETS, AugmentConfig, BadImageError, DataConfig, build_datasets, default_root, train_loader
from sparse_mlp.data.timm_sets import ReaderSource

PLAIN = AugmentConfig()


def test_digits_are_split_into_fixed_stratified_thirds():
    data = build_datasets(DataConfig(), PLAIN)
    assert (len(data.train), len(data.test)) == (1198, 599)
    assert (data.spec.channels, data.spec.image_size, len(data.classes)) == (1, 8, 10)
    counts = [np.bincount(images.labels, minlength=10) for images in (data.train, data.test)]
    assert np.abs(counts[0] - 2 * counts[1]).max() <= 2
    # The split of every number that was ever published with this recipe.
    assert data.test.labels[:20].tolist() == [2, 3, 7, 0, 8, 4, 8, 4, 6, 5, 4, 9, 8, 4, 8, 9, 7, 2, 7, 5]


def test_known_mean_and_deviation_are_those_of_the_training_images():
    data = build_datasets(DataConfig(), PLAIN)
    pixels = data.train.batch(range(len(data.train)))["image"]
    assert abs(pixels.mean()) < 0.01 and abs(pixels.std() - 1) < 0.01


@pytest.mark.slow  # may have to write the official files first: about 8 s
def test_known_mean_and_deviation_of_cifar10(cifar10_root: Path):
    data = build_datasets(DataConfig(name="cifar10", root=str(cifar10_root)), PLAIN)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert (data.spec.channels, data.spec.image_size, len(data.classes)) == (3, 32, 10)
    assert (np.bincount(data.train.labels) == 5000).all() and (np.bincount(data.test.labels) == 1000).all()
    pixels = data.train.batch(range(50_000))["image"]
    assert pixels.mean((0, 2, 3)).abs().max() < 0.01 and (pixels.std((0, 2, 3)) - 1).abs().max() < 0.01


def test_images_of_another_size():
    data = build_datasets(DataConfig(image_size=16), AugmentConfig(pad=1))
    assert data.train.batch([0, 1], (0, 0))["image"].shape == data.test.batch([0, 1])["image"].shape == (2, 1, 16, 16)


def test_default_root_follows_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("SPARSE_MLP_DATA", raising=False)
    assert default_root("cifar10") == Path("data/cifar10")
    monkeypatch.setenv("SPARSE_MLP_DATA", str(tmp_path))
    assert default_root("cifar100") == tmp_path / "cifar100"
    assert default_root("torch/cifar10") == tmp_path / "torch_cifar10"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(name="cifr10"), "did you mean cifar10"),
        (DataConfig(name="folder"), "--data.root"),
        (DataConfig(num_classes=7), "num_classes is 7, but digits has 10"),
        (DataConfig(channels=3), "channels is 3"),
        (DataConfig(on_bad_image="skip"), "on_bad_image 'skip' would be ignored"),
        (DataConfig(name="torch/nothing"), "torch/nothing"),
        (DataConfig(name="torch/cifar10", num_samples=3), "num_samples"),
        (DataConfig(download=True), "download True would be ignored"),
        (DataConfig(test_share=0.1), "test_share 0.1 would be ignored"),
        (DataConfig(crop_pct=0.9), "crop_pct"),
        (DataConfig(train_split="x"), "train_split"),
        (DataConfig(mean=(0.1, 0.2)), "one number for each"),
        (DataConfig(root="photos"), "data.root .photos. would be ignored by digits"),
        (DataConfig(name="torch/folder", root="."), "is read as data.name folder"),
        (DataConfig(name="wds/x", root=".", download=True), "download True would be ignored"),
        (DataConfig(batch_size=0), "data.batch_size 0 must be at least 1$"),
        (DataConfig(name="folder", root=".", crop_pct=0.0), "data.crop_pct 0.0 must be above 0 and at most 1$"),
    ],
)
def test_wrong_settings_are_one_clear_line(config: DataConfig, message: str):
    with pytest.raises(ValueError, match=message) as error:
        build_datasets(config, PLAIN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (AugmentConfig(mixup=-1.0), "augment.mixup -1.0 must be at least 0$"),
        (AugmentConfig(flip=float("nan")), "augment.flip nan must be at least 0 and at most 1$"),
        (AugmentConfig(rotate=float("inf")), "augment.rotate inf must be"),
        (AugmentConfig(crop_scale=(0.0, 1.0)), "augment.crop_scale 0.0 1.0 must be two numbers with 0 < first"),
        (AugmentConfig(crop_ratio=(2.0, 1.0)), "augment.crop_ratio 2.0 1.0 must be two numbers with 0 < first"),
    ],
)
def test_numbers_that_cannot_be(augment: AugmentConfig, message: str):
    with pytest.raises(ValueError, match=message):
        build_datasets(DataConfig(), augment)


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("cifar")])
def test_a_set_that_is_not_there_says_what_is_expected_where(name: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="expected") as error:
        build_datasets(DataConfig(name=name, root=str(tmp_path)), PLAIN)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_timm_set_is_read_one_by_one(tmp_path: Path, channels: int):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind, count in (("train", 12), ("t10k", 6)):
        write_idx(raw / f"{kind}-images-idx3-ubyte", np.arange(count * 28 * 28).reshape(count, 28, 28) % 256)
        write_idx(raw / f"{kind}-labels-idx1-ubyte", np.arange(count) % 10)
    config = DataConfig(name="torch/mnist", root=str(tmp_path), image_size=32, channels=channels, batch_size=4)
    data = build_datasets(config, AugmentConfig(crop_scale=(0.5, 1.0)))
    assert (len(data.train), len(data.test)) == (12, 6) and data.classes == MNIST.classes
    batch = next(iter(train_loader(data, config, 0, steps=1)))
    assert batch["image"].shape == (4, channels, 32, 32)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_a_set_of_hugging_face_is_decoded_as_a_folder_is():
    """By a stand-in for timm's reader, which gives encoded images."""

    class Reader:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
            content = io.BytesIO()
            Image.fromarray(np.full((8, 8), 257 * 40 * index, dtype=np.uint16)).save(content, "png")
            return io.BytesIO(content.getvalue()[: 30 if index == 2 else None]), index

        def filename(self, index: int) -> str:
            return f"{index}.png"

    source = ReaderSource(Reader(), 3)
    assert np.asarray(source[1][0])[0, 0].tolist() == [40, 40, 40] and source[1][1] == 1 and len(source) == 3
    with pytest.raises(BadImageError, match=r"cannot read image 2\.png"):
        source[2]


def test_sets_can_go_to_worker_processes_by_spawn():
    data = build_datasets(DataConfig(), AugmentConfig(pad=1, erase=0.1, mixup=0.2))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.train.batch([3], (0, 0))["image"], data.train.batch([3], (0, 0))["image"])


def test_a_share_of_the_labels_is_balanced_and_a_function_of_its_seed():
    whole = build_datasets(DataConfig(), PLAIN).train
    part, again, other = (
        build_datasets(DataConfig(label_share=0.1, label_seed=seed), PLAIN).train for seed in (0, 0, 1)
    )
    counts = np.bincount(whole.labels, minlength=10)
    assert np.bincount(part.labels, minlength=10).tolist() == [round(0.1 * count) for count in counts]
    assert torch.equal(part.images, again.images) and not torch.equal(part.images, other.images)
    known = {image.numpy().tobytes() for image in whole.images}
    assert {image.numpy().tobytes() for image in part.images} <= known
    assert part.batch([0])["image"].shape == (1, 1, 8, 8)


@pytest.mark.slow
def test_one_percent_of_cifar10_is_fifty_images_a_class(cifar10_root: Path):
    data = build_datasets(DataConfig(name="cifar10", root=str(cifar10_root), label_share=0.01), PLAIN)
    assert np.bincount(data.train.labels).tolist() == [50] * 10 and len(data.test) == 10_000


def test_a_share_of_a_folder(tmp_path: Path):
    for name, count in (("cat", 10), ("dog", 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    config = DataConfig(name="folder", root=str(tmp_path), image_size=8, test_share=0.5, label_share=0.4)
    train = build_datasets(config, PLAIN).train
    batch = train.batch(range(len(train)), (0, 0))
    assert batch["target"].tolist() == [0] * 2 + [1] * 4 and batch["image"].shape == (6, 3, 8, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(label_share=0.001), "leaves class 0 without an image: it has 119"),
        (DataConfig(label_share=0.0), r"label_share 0.0 is not in \(0, 1\]"),
        (DataConfig(label_share=1.5), r"label_share 1.5 is not in \(0, 1\]"),
        (DataConfig(label_seed=1), "label_seed 1 would be ignored"),
        (DataConfig(name="torch/cifar10", label_share=0.1), "label_share 0.1 would be ignored by torch/cifar10"),
    ],
)
def test_shares_that_cannot_be(config: DataConfig, message: str):
    with pytest.raises(ValueError, match=message):
        build_datasets(config, PLAIN)
