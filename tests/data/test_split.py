"""The stored split of a folder, and classes matched by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_mlp.data import (
    AugmentConfig,
    DataConfig,
    ImageData,
    build_datasets,
    eval_loader,
    image_data_from,
    match_classes,
    train_loader,
)
from sparse_mlp.errors import UserError

MakeFolder = Callable[..., Path]


def config(root: Path, **settings) -> DataConfig:
    return DataConfig(**({"name": "folder", "root": str(root), "image_size": 16, "batch_size": 4} | settings))


def build(root: Path, split=None, classes=None, **settings) -> ImageData:
    return build_datasets(config(root, **settings), AugmentConfig(flip=0.5), split=split, classes=classes)


def stored(data: ImageData) -> dict[str, list[str]]:
    return json.loads(json.dumps(data.split))


def names(images) -> list[str]:
    return [images.file_name(i) for i in range(len(images))]


def add(root: Path, *parts: str) -> None:
    path = root.joinpath(*parts)
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (20, 20), (9, 8, 7)).save(path)


def test_a_split_names_every_image_once(make_folder: MakeFolder):
    data = build(make_folder("set", count=10))
    split = stored(data)
    assert split == {"train": names(data.train), "test": names(data.test)}
    assert sorted(split["train"] + split["test"]) == [
        f"{name}/{i:02d}.png" for name in ("cat", "dog") for i in range(10)
    ]
    assert len(split["test"]) == 4


def test_images_that_came_later_are_neither_trained_nor_tested_on(make_folder: MakeFolder):
    root = make_folder("set", count=10)
    data = build(root)
    before, split = list(train_loader(data, config(root), 0, steps=6)), stored(data)
    for i in range(20):
        add(root, "cat", f"new{i}.png")
    assert set(names(build(root).test)) != set(split["test"]), "what a new split does"
    add(root, "ape", "0.png")  # a class of its own, which is not trained
    again = build(root, split)
    assert again.classes == ["cat", "dog"] and stored(again) == split
    assert again.notes == ["21 images are not in the stored split and count as neither training nor test images"]
    after = list(train_loader(again, config(root), 0, steps=6))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(before, after, strict=True))


def test_a_split_goes_with_the_folder(make_folder: MakeFolder):
    root = make_folder("set", count=10)
    split = stored(build(root))
    moved = Path(shutil.move(root, root.parent / "elsewhere"))
    assert stored(build(moved, split)) == split


def test_test_images_that_are_gone_are_counted(make_folder: MakeFolder):
    root = make_folder("set", count=10)
    split = stored(build(root))
    (root / split["test"][1]).unlink()
    data = build(root, split)
    assert names(data.test) == [name for name in split["test"] if name != split["test"][1]]
    assert data.notes == [f"1 of the 4 test images of the stored split are gone: {split['test'][1]}, ..."]
    for name in split["test"]:
        (root / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="none of the 4 test images of the stored split is in"):
        build(root, split)


def test_training_images_that_are_gone_keep_their_place(make_folder: MakeFolder):
    root = make_folder("set", count=10)
    whole, split = list(train_loader(build(root), config(root), 0, steps=4)), stored(build(root))
    (root / split["train"][3]).unlink()
    data = build(root, split)
    assert names(data.train) == split["train"] and "1 of the 16 train images" in data.notes[0]
    with pytest.raises(OSError, match=f"{split['train'][3]}: there is no such file"):
        list(train_loader(data, config(root), 0, steps=4))
    skipping = build(root, split, on_bad_image="skip")
    for a, b in zip(train_loader(skipping, config(root), 0, steps=4), whole, strict=True):
        kept = b["index"] != 3
        assert torch.equal(a["image"][kept], b["image"][kept]) and torch.equal(a["target"][kept], b["target"][kept])


def test_a_folder_with_its_own_division_stores_none(make_folder: MakeFolder):
    make_folder("set", "train")
    root = make_folder("set", "val").parent
    assert build(root).split == {} and build(root, {}).split == {}
    with pytest.raises(UserError, match="has a train/ folder now"):
        build(root, {"train": ["cat/00.png"], "test": ["dog/00.png"]})


def test_folders_beside_train_and_val_are_said(make_folder: MakeFolder):
    for name in ("train", "test", "val", "extra"):
        make_folder("set", name)
    root = make_folder("set", "more").parent
    assert build(root).notes == ["not used beside train/ and val/: extra, more, test"]


def test_a_split_is_for_folders():
    assert build_datasets(DataConfig(), AugmentConfig()).split == {}
    with pytest.raises(UserError, match="a stored split is for a folder of images; digits has its own"):
        build_datasets(DataConfig(), AugmentConfig(), split={"train": ["a/b"], "test": []})


def test_all_of_a_folder_can_be_tested_on(make_folder: MakeFolder):
    data = build(make_folder("set", count=1), test_share=1.0)
    assert (len(data.train), len(data.test)) == (0, 2)
    assert len(next(iter(eval_loader(data, DataConfig())))["target"]) == 2
    build(make_folder("other", count=1), test_share=1.0, on_bad_image="skip")


def test_classes_are_matched_by_name(make_folder: MakeFolder):
    root = make_folder("set", classes=("fox", "cat"))  # sorted: cat, fox
    data = build(root, classes=["dog", "fox", "cat"], test_share=1.0)
    assert data.classes == ["dog", "fox", "cat"]
    (batch,) = eval_loader(data, config(root))
    assert batch["target"].tolist() == [2] * 4 + [1] * 4
    assert [data.classes[label] for label in batch["target"]] == [str(n).split("/")[0] for n in names(data.test)]
    mixed = build_datasets(config(root), AugmentConfig(mixup=0.5), classes=["dog", "fox", "cat"])
    assert next(iter(train_loader(mixed, config(root), 0, steps=1)))["target"].shape == (4, 3)


def test_classes_that_were_not_trained_are_named(make_folder: MakeFolder):
    root = make_folder("set", classes=("ape", "cat", "dogs"))
    message = r"not trained on: 'ape', 'dogs' \(nearest: 'dog'\); it knows 'cat', 'dog', 'fox'$"
    with pytest.raises(UserError, match=message) as error:
        build(root, classes=["cat", "dog", "fox"])
    assert "\n" not in str(error.value)


def test_sets_in_memory_are_matched_by_name_too():
    backwards = [str(n) for n in reversed(range(10))]
    data = build_datasets(DataConfig(), AugmentConfig(), classes=[*backwards, "ten"])
    plain = build_datasets(DataConfig(), AugmentConfig())
    assert torch.equal(data.test.labels, 9 - plain.test.labels) and len(data.classes) == 11
    with pytest.raises(UserError, match="not trained on"):
        build_datasets(DataConfig(), AugmentConfig(), classes=backwards[1:])


def test_the_same_classes_change_nothing():
    plain = build_datasets(DataConfig(), AugmentConfig())
    data = build_datasets(DataConfig(), AugmentConfig(), classes=plain.classes)
    assert torch.equal(data.test.labels, plain.test.labels)


def test_match_classes():
    assert match_classes(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert match_classes(["caf\u00e9"], ["cafe\u0301"]) == [0], "an accent as one character or two"
    with pytest.raises(UserError, match=r"'1', '2', '3', '4', '5' and 4 more; it knows 'a'"):
        match_classes(["a"], [str(n) for n in range(1, 10)])


def test_a_share_of_the_labels_and_other_classes_go_together(make_folder: MakeFolder):
    root = make_folder("set", count=10)
    data = build(root, classes=["dog", "cat"], label_share=0.5)
    assert data.train.batch(range(len(data.train)))["target"].tolist() == [1] * 4 + [0] * 4


def test_every_image_of_a_file_can_be_named(make_folder: MakeFolder):
    make_folder("set", "train")
    root = make_folder("set", "val").parent
    data = build(root, label_share=0.5)
    assert names(data.test)[5] == "val/dog/01.png"
    assert all(name.startswith("train/") for name in names(data.train)) and len(data.train) == 4
    for batch in eval_loader(data, config(root)):
        for index, label in zip(batch["index"].tolist(), batch["target"].tolist(), strict=True):
            assert f"/{data.classes[label]}/" in data.test.file_name(index)


def test_images_without_a_file_have_no_name():
    digits = build_datasets(DataConfig(), AugmentConfig())
    assert digits.test.file_name(0) is None
    own = [(np.zeros((8, 8), dtype=np.uint8), 0)] * 3
    assert image_data_from(own, own).test.file_name(0) is None
