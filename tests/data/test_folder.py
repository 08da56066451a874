from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_mlp.data import AugmentConfig, BadImageError, DataConfig, ImageData, build_datasets, eval_loader
from sparse_mlp.data import train_loader as loader

MakeFolder = Callable[..., Path]
VARIED = AugmentConfig(crop_scale=(0.5, 1.0), flip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erase=0.25)


def config(root: Path, **settings) -> DataConfig:
    return DataConfig(**({"name": "folder", "root": str(root), "image_size": 16, "batch_size": 4} | settings))


def build(root: Path, augment: AugmentConfig = VARIED, **settings) -> ImageData:
    return build_datasets(config(root, **settings), augment)


def test_train_and_val_subfolders(make_folder: MakeFolder):
    make_folder("set", "train", count=5)
    root = make_folder("set", "val", count=3).parent
    data = build(root)
    assert (len(data.train), len(data.test), data.classes) == (10, 6, ["cat", "dog"])
    (batch,) = eval_loader(data, config(root))
    assert batch["image"].shape == (6, 3, 16, 16)
    assert batch["target"].tolist() == [0, 0, 0, 1, 1, 1]


def test_one_folder_is_split_the_same_way_every_time_and_by_class(make_folder: MakeFolder):
    root = make_folder("set", count=10)
    first, second = build(root), build(root)
    assert first.train.source.samples == second.train.source.samples
    assert [label for _, label in first.test.source.samples] == [0, 0, 1, 1]
    assert not {path for path, _ in first.train.source.samples} & {path for path, _ in first.test.source.samples}
    moved = Path(shutil.copytree(root, root.parent / "elsewhere"))
    names = [Path(path).relative_to(root) for path, _ in first.test.source.samples]
    assert [Path(path).relative_to(moved) for path, _ in build(moved).test.source.samples] == names


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_image_only(make_folder: MakeFolder, workers: int):
    root = make_folder("set", count=10)
    data = build(root)
    whole = list(loader(data, config(root), 0, steps=7))
    resumed = list(loader(data, config(root, workers=workers), 0, start_step=3, steps=4))
    halves = [list(loader(data, config(root), 0, start_step=3, steps=4, rank=r, world_size=2)) for r in range(2)]
    for step, batch in enumerate(whole[3:]):
        assert torch.equal(batch["image"], resumed[step]["image"])
        assert torch.equal(batch["image"], torch.cat([half[step]["image"] for half in halves]))


def test_grey_images_on_request(make_folder: MakeFolder):
    root = make_folder("set")
    data = build(root, AugmentConfig(flip=0.5), channels=1)
    assert data.spec.channels == 1
    assert next(iter(loader(data, config(root), 0, steps=1)))["image"].shape == (4, 1, 16, 16)


def damage(root: Path) -> tuple[Path, Path]:
    """Cut one image short and replace one by text."""
    images = sorted((root / "cat").iterdir())
    truncated, text = images[0], images[1]
    truncated.write_bytes(truncated.read_bytes()[:-400])
    text.write_text("no picture")
    return truncated, text


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_is_fatal_and_named_by_default(make_folder: MakeFolder, workers: int):
    damaged = damage(make_folder("set", "train"))
    root = make_folder("set", "val").parent
    with pytest.raises(BadImageError) as error:
        list(loader(build(root), config(root, workers=workers), 0, steps=2))
    assert "\n" not in str(error.value)
    assert any(str(path) in str(error.value) for path in damaged)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_counted_on_request(
    make_folder: MakeFolder, workers: int, caplog: pytest.LogCaptureFixture
):
    damaged = damage(make_folder("set", "train"))
    root = make_folder("set", "val").parent
    broken_test = damage(root / "val")
    data, settings = build(root, on_bad_image="skip"), config(root, workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = list(loader(data, settings, 0, steps=4))
    assert all(batch["image"].shape == (4, 3, 16, 16) for batch in batches)
    assert not {0, 1} & {i for batch in batches for i in batch["index"].tolist()}
    assert [i for batch in eval_loader(data, settings) for i in batch["index"].tolist()] == [2, 3, 4, 5, 6, 7]
    assert set(data.bad_images()) == {str(path) for path in damaged + broken_test}
    if workers == 0:  # the log of a worker process is its own
        assert sum(str(damaged[0]) in record.getMessage() for record in caplog.records) == 1


def test_skipping_does_not_make_the_stream_depend_on_workers(make_folder: MakeFolder):
    damage(make_folder("set", "train"))
    root = make_folder("set", "val").parent
    data = build(root, on_bad_image="skip")
    one, two = (list(loader(data, config(root, workers=w), 0, steps=4)) for w in (0, 2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two, strict=True))


def test_a_folder_of_nothing_readable_ends(make_folder: MakeFolder):
    root = make_folder("set", count=4)
    for path in root.rglob("*.png"):
        path.write_text("no picture")
    data = build(root, on_bad_image="skip")
    with pytest.raises(OSError, match="none of the 6 images can be read"):
        list(loader(data, config(root), 0, steps=1))
    assert list(eval_loader(data, config(root))) == []


def one_image(make: MakeFolder) -> Path:
    return make("set", count=1)


def no_test(make: MakeFolder) -> Path:
    return make("set", "train").parent


def class_only_in_train(make: MakeFolder) -> Path:
    make("set", "train", classes=("cat", "dog", "owl"))
    return make("set", "val").parent


def class_only_in_test(make: MakeFolder) -> Path:
    make("set", "train")
    return make("set", "val", classes=("cat", "dog", "owl")).parent


def empty_class(make: MakeFolder) -> Path:
    root = make("set")
    (root / "owl").mkdir()
    return root


def no_images(make: MakeFolder) -> Path:
    root = make("set", count=0)
    (root / "cat" / "notes.txt").write_text("no picture")
    return root


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (one_image, "00.png is the only one"),
        (lambda make: make("set", classes=()) / "missing", "not a folder"),
        (no_test, "has train/ but none of val/"),
        (class_only_in_train, "'owl' is not in val/"),
        (class_only_in_test, "'owl' is not in train/"),
        (empty_class, "owl has no images"),
        (no_images, "no images"),
    ],
)
def test_wrong_folders_are_one_clear_line(make_folder: MakeFolder, layout: Callable[[MakeFolder], Path], message: str):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        build(layout(make_folder))
    assert "\n" not in str(error.value)


def test_empty_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no class folders"):
        build(tmp_path)


def test_test_share_would_be_ignored_where_there_is_a_train_folder(make_folder: MakeFolder):
    make_folder("set", "train")
    root = make_folder("set", "val").parent
    with pytest.raises(ValueError, match="would be ignored"):
        build(root, test_share=0.3)


def test_test_share_must_be_a_share(make_folder: MakeFolder):
    with pytest.raises(ValueError, match="test_share"):
        build(make_folder("set"), test_share=1.5)
