"""Streams: timm's IterableImageDataset over a reader of our own that counts, and over real WebDataset shards."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import get_worker_info

from sparse_mlp.data import AugmentConfig, DataConfig, ImageData, build_datasets, eval_loader, steps_per_epoch
from sparse_mlp.data import train_loader as loader
from sparse_mlp.data.sets import build_files
from sparse_mlp.data.views import ViewsConfig, in_two_views, view_loader
from sparse_mlp.errors import UserError

CONFIG = DataConfig(name="wds/counted", image_size=16, batch_size=4, eval_batch_size=5, num_classes=3)


class Reader:
    """Yields grey levels as images; the order of an epoch is its own."""

    def __init__(self, count: int, told: int | None = None) -> None:
        self.count, self.told, self.epoch = count, told or count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.told

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        info = get_worker_info()
        order = np.random.default_rng(self.epoch).permutation(self.count)
        for i in order[info.id :: info.num_workers] if info else order:
            yield Image.fromarray(np.full((20, 20, 3), i, dtype=np.uint8)), int(i) % 3


def build(train: int = 18, told: int | None = None, mixup: float = 0.0) -> ImageData:
    sets = [IterableImageDataset("", reader=Reader(train, told)), IterableImageDataset("", reader=Reader(12))]
    augment = AugmentConfig(crop_scale=(0.3, 1.0), flip=0.5, erase=0.5, mixup=mixup)
    return build_files(CONFIG, augment, *sets, classes=["a", "b", "c"])


def test_an_epoch_has_its_whole_batches():
    assert steps_per_epoch(build(), CONFIG) == 4


@pytest.mark.parametrize("mixup", [0.0, 0.5])
@pytest.mark.parametrize("start", [1, 4, 6])
def test_resuming_without_workers_is_exact_because_the_batches_before_are_read(start: int, mixup: float):
    whole = list(loader(build(mixup=mixup), CONFIG, 0, steps=9))
    assert len(whole) == 9 and whole[0]["image"].shape == (4, 3, 16, 16)
    for first, second in zip(
        whole[start:], loader(build(mixup=mixup), CONFIG, 0, start_step=start, steps=9 - start), strict=True
    ):
        assert torch.equal(first["image"], second["image"]) and torch.equal(first["target"], second["target"])


def test_epochs_differ():
    batches = list(loader(build(), CONFIG, 0, steps=8))
    assert not torch.equal(batches[0]["image"], batches[4]["image"])


def test_the_global_generators_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(loader(build(), CONFIG, 0, steps=5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_all_images(workers: int):
    targets = [t for batch in eval_loader(build(), replace(CONFIG, workers=workers)) for t in batch["target"].tolist()]
    assert sorted(targets) == sorted(i % 3 for i in range(12))


def test_a_stream_shorter_than_told_is_an_error():
    with pytest.raises(ValueError, match="ended after 4 of 10 batches"):
        list(loader(build(18, told=40), CONFIG, 0, steps=10))


def test_a_stream_that_does_not_tell_its_length_is_an_error():
    data = build()
    data.train.reader = iter([])
    with pytest.raises(ValueError, match="num-samples"):
        steps_per_epoch(data, CONFIG)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The first 60 and 30 digits in tar files, three to train on and two to test on, as WebDataset has them."""
    pytest.importorskip("webdataset")
    digits = build_datasets(DataConfig(), AugmentConfig())
    info = {}
    for split, images, count, files in (("train", digits.train, 60, 3), ("validation", digits.test, 30, 2)):
        names = [f"digits-{split}-{number:04d}.tar" for number in range(files)]
        for number, name in enumerate(names):
            with tarfile.open(tmp_path / name, "w") as tar:
                for i in range(number, count, files):
                    png = io.BytesIO()
                    Image.fromarray(images.images[i, 0].numpy()).save(png, "png")
                    for suffix, content in (("png", png.getvalue()), ("cls", b"%d" % images.labels[i])):
                        entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        lengths = [count // files] * files
        info[split] = {"name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    return tmp_path


# webdataset leaves the shard open that an epoch ended in; collected here, so that no other test hears of it
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_shards(shards: Path, workers: int):
    config = DataConfig(
        name="wds/digits", root=str(shards), image_size=8, channels=1, batch_size=10, eval_batch_size=7,
        num_classes=10, mean=(0.0,), std=(1.0,), crop_pct=1.0, workers=workers,
    )  # fmt: skip
    data = build_datasets(config, AugmentConfig())
    per_epoch = steps_per_epoch(data, config)
    assert per_epoch == 6
    digits = build_datasets(DataConfig(), AugmentConfig())
    batches = list(eval_loader(data, config))
    found = sorted(image.mul(255).round().byte().numpy().tobytes() for batch in batches for image in batch["image"])
    assert found == sorted(image.numpy().tobytes() for image in digits.test.images[:30])
    targets = torch.cat([batch["target"] for batch in batches])
    assert torch.equal(targets.bincount(minlength=10), digits.test.labels[:30].bincount(minlength=10))
    whole = list(loader(data, config, 0, steps=9))
    assert [tuple(batch["image"].shape) for batch in whole] == [(10, 1, 8, 8)] * 9
    resumed = list(loader(build_datasets(config, AugmentConfig()), config, 0, start_step=8, steps=1))
    assert torch.equal(resumed[0]["image"], whole[8]["image"]) and torch.equal(resumed[0]["target"], whole[8]["target"])
    gc.collect()


def test_shards_that_are_not_there(shards: Path):
    config = DataConfig(name="wds/digits", root=str(shards), image_size=8, num_classes=10, train_split="trian")
    with pytest.raises(ValueError, match="timm cannot open 'wds/digits', split 'trian': split trian not found in info"):
        build_datasets(config, AugmentConfig())


def write_shards(root: Path, images: list[tuple[str, bytes, int]]) -> Path:
    """One shard of (suffix, encoded image, label) that both splits read."""
    with tarfile.open(root / "a.tar", "w") as tar:
        for i, (suffix, image, label) in enumerate(images):
            for name, content in ((f"{i:05d}.{suffix}", image), (f"{i:05d}.cls", b"%d" % label)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    split = {"name": "a", "num_samples": len(images), "filenames": ["a.tar"], "shard_lengths": [len(images)]}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split, "validation": split}}))
    return root


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **more)
    return content.getvalue()


SHARDS = DataConfig(
    name="wds/x", image_size=8, channels=1, batch_size=2, num_classes=2, mean=(0.0,), std=(1.0,), crop_pct=1.0
)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_images_in_shards_are_upright_and_of_any_depth(tmp_path: Path):
    pytest.importorskip("webdataset")
    exif = Image.Exif()
    exif[274] = 3  # turned by half
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:4] = 200
    deep = Image.fromarray(np.full((8, 8), 257 * 60, dtype=np.uint16))
    turned = encoded(Image.fromarray(half), "png", exif=exif)
    root = write_shards(tmp_path, [("png", encoded(deep, "png"), 0), ("png", turned, 1)])
    config = replace(SHARDS, root=str(root))
    (batch,) = eval_loader(build_datasets(config, AugmentConfig()), config)
    deep_pixels, turned_pixels = batch["image"][:, 0].mul(255).round()
    assert deep_pixels.unique().tolist() == [60]
    assert turned_pixels[:4].unique().tolist() == [0] and turned_pixels[4:].unique().tolist() == [200]
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("label", [2, -1])
def test_labels_beyond_the_classes_are_one_line(tmp_path: Path, label: int):
    pytest.importorskip("webdataset")
    png = encoded(Image.new("L", (8, 8)), "png")
    root = write_shards(tmp_path, [("png", png, 1), ("png", png, label)])
    config = replace(SHARDS, root=str(root))
    data = build_datasets(config, AugmentConfig())
    with pytest.raises(UserError, match=f"wds/x holds the label {label}, and data.num_classes 2 allows 0 to 1"):
        list(loader(data, config, 0, steps=1))
    with pytest.raises(UserError, match=f"the label {label},"):
        list(eval_loader(data, config))
    gc.collect()


def test_the_classes_of_a_stream_must_be_those_of_the_model(shards: Path):
    config = DataConfig(name="wds/digits", root=str(shards), image_size=8, num_classes=10)
    digits = [str(n) for n in range(10)]
    assert build_datasets(config, AugmentConfig(), classes=digits).classes == digits
    with pytest.raises(UserError, match="classes of a stream"):
        build_datasets(config, AugmentConfig(), classes=digits[::-1])


def test_a_stream_in_two_views():
    def views(start: int, steps: int) -> list[dict[str, torch.Tensor]]:
        return list(view_loader(in_two_views(build(), ViewsConfig()), CONFIG, 0, start_step=start, steps=steps))

    whole = views(0, 7)
    assert set(whole[0]) == {"view1", "view2", "target", "index"}
    assert whole[0]["view1"].shape == (4, 3, 16, 16) and not torch.equal(whole[0]["view1"], whole[0]["view2"])
    for first, second in zip(whole[5:], views(5, 2), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stream_cannot_be_repeated():
    with pytest.raises(ValueError, match="repeats 3 would be ignored"):
        loader(build(), replace(CONFIG, repeats=3), 0, steps=1)
