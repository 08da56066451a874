"""Data in COCO's format: what is read, what is refused, and that boxes and masks stay on their objects."""

from __future__ import annotations

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests import coco_files

from sparse_mlp.data.coco import CocoConfig, open_coco
from sparse_mlp.data.loader import eval_loader, train_loader
from sparse_mlp.errors import UserError

pytest.importorskip("pycocotools")


@pytest.fixture
def root(tmp_path):
    return coco_files.write(tmp_path / "set")


def small(root, **changes):
    sizes = {"short_sides": (64,), "test_short_side": 64, "max_side": 96, "flip": 0.0}
    return CocoConfig(root=str(root), batch_size=2, **(sizes | changes))


def colour_of(category, pixels):
    """Where pixels (3, H, W) have the colour of a category."""
    distance = np.abs(pixels.numpy().astype(int) - np.array(coco_files.COLOURS[category])[:, None, None])
    return distance.max(axis=0) < 60


def check_places(image, target, *, tolerance=2.0):
    """Every box and mask lies on an object of its colour."""
    assert len(target["labels"])
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        painted = colour_of((3, 17)[int(label)], image)
        x1, y1, x2, y2 = (int(value) for value in box.round())
        inside = np.zeros_like(painted)
        inside[y1:y2, x1:x2] = True
        rows, columns = np.nonzero(painted & inside)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, box.numpy(), atol=tolerance)
        both, either = (mask.numpy().astype(bool) & painted & inside).sum(), (mask.numpy() | (painted & inside)).sum()
        assert both / either > 0.85


def test_boxes_and_masks_are_on_their_objects(root):
    data = open_coco(small(root), masks=True)
    assert data.classes == ("square", "disc")
    batch = data.train.batch([0, 1, 2, 3], (0, 0))
    for image, target in zip(batch["image"], batch["target"], strict=True):
        assert image.dtype == torch.uint8
        check_places(image, target)


@pytest.mark.parametrize("changes", [{"flip": 1.0}, {"short_sides": (48, 80)}, {"crop": True, "flip": 0.5}])
def test_augmented_they_are_on_their_objects_too(root, changes):
    data = open_coco(small(root, **changes), masks=True)
    sizes = set()
    for epoch in range(6):
        batch = data.train.batch([0, 1, 2, 3], (0, epoch))
        for image, target in zip(batch["image"], batch["target"], strict=True):
            sizes.add(tuple(image.shape))
            whole = replace_cut(image, target)
            if len(whole["labels"]):
                check_places(image, whole, tolerance=2.5)
    if "flip" not in changes:
        assert {size[1] for size in sizes} == {48, 80}


def replace_cut(image, target):
    """Without the objects that a crop cut."""
    height, width = image.shape[1:]
    limit = torch.tensor([width, height])
    kept = (target["boxes"][:, :2] > 1).all(1) & (target["boxes"][:, 2:] < limit - 1).all(1)
    return {name: target[name][kept] for name in ("boxes", "labels", "masks")}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_with_exif_orientation_is_upright_and_boxes_stay_on_it(tmp_path, orientation):
    """The annotations are in the frame of the stored file."""
    root = coco_files.write(tmp_path / "set", images=2)
    picture = np.full((48, 64, 3), 120, np.uint8)
    coco_files.paint(picture, 3, 6, 4, 16)
    coco_files.paint(picture, 17, 36, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(root / "train2017" / "1.png", exif=exif)

    def describe(content):
        content["images"][0] |= {"width": 64, "height": 48}
        content["annotations"] = [
            coco_files.annotation(1, 1, 3, 6, 4, 16),
            coco_files.annotation(2, 1, 17, 36, 20, 20),
            *(a for a in content["annotations"] if a["image_id"] == 2),
        ]
        for number, record in enumerate(content["annotations"], 1):
            record["id"] = number

    coco_files.change(root, "train", describe)
    scene, found = open_coco(small(root), masks=True).train.load(0)
    assert found == orientation
    assert scene.image.size == ((48, 64) if orientation >= 5 else (64, 48))
    pixels = torch.from_numpy(np.array(scene.image).transpose(2, 0, 1).copy())
    check_places(pixels, {"boxes": scene.boxes, "labels": scene.labels, "masks": scene.masks})


def test_annotations_of_a_tool_that_turned_the_photo_are_kept(tmp_path):
    """The size that the file states is that of the upright photo."""
    root = coco_files.write(tmp_path / "set", images=2)
    upright = Image.fromarray(np.full((64, 48, 3), 120, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "train2017" / "1.png", exif=exif)

    def describe(content):
        content["images"][0] |= {"width": 48, "height": 64}
        content["annotations"] = [coco_files.annotation(1, 1, 3, 6, 4, 16)]

    coco_files.change(root, "train", describe)
    scene, orientation = open_coco(small(root), masks=True).train.load(0)
    assert orientation == 1
    assert scene.boxes.tolist() == [[6, 4, 22, 20]]


def test_batches_are_functions_of_seed_and_step(root):
    config = small(root, short_sides=(48, 56, 64), flip=0.5, crop=True)
    data = open_coco(config, masks=True)
    whole = list(train_loader(data, config, 3, start_step=0, steps=4))
    later = list(train_loader(data, replace(config, workers=1), 3, start_step=2, steps=2))
    for one, other in zip(whole[2:], later, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert all(torch.equal(a, b) for a, b in zip(one["image"], other["image"], strict=True))
        for a, b in zip(one["target"], other["target"], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("boxes", "labels", "masks"))
    half = [b for r in range(2) for b in train_loader(data, config, 3, steps=1, rank=r, world_size=2)]
    assert torch.equal(torch.cat([b["index"] for b in half]), whole[0]["index"])


def test_images_in_zips_of_either_layout(root, tmp_path):
    config = small(root)
    for prefix, split in (("", "train"), ("val2017/", "val")):
        with zipfile.ZipFile(root / f"{split}2017.zip", "w") as archive:
            for file in (root / f"{split}2017").iterdir():
                archive.write(file, prefix + file.name)
    zipped = replace(config, train_images="train2017.zip", test_images="val2017.zip")
    for name, loader in (("image", eval_loader),):
        for one, other in zip(
            loader(open_coco(config, masks=True), config),
            loader(open_coco(zipped, masks=True), replace(zipped, workers=2)),
            strict=True,
        ):
            assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))


def test_the_first_images_are_trained_and_evaluated_on(root):
    data = open_coco(small(root, limit=3, test_on="train"), masks=True)
    assert [len(data.train), len(data.test)] == [3, 3]
    assert [data.test.file_name(i) for i in range(3)] == ["1.png", "2.png", "3.png"]


def test_images_without_objects_are_evaluated_on_and_trained_on_by_option(root):
    def empty(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]

    coco_files.change(root, "train", empty)
    coco_files.change(root, "val", empty)
    data = open_coco(small(root), masks=True)
    assert [len(data.train), len(data.test)] == [3, 4]
    kept = open_coco(small(root, keep_empty=True), masks=True)
    target = kept.train.batch([1], (0, 0))["target"][0]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 64, 64)


def test_crowds_are_evaluated_on_but_not_trained_on(root):
    def crowd(content):
        content["annotations"][0] |= {"iscrowd": 1, "segmentation": {"size": [64, 64], "counts": [100, 50, 3946]}}

    coco_files.change(root, "train", crowd)
    data = open_coco(small(root, test_on="train"), masks=True)
    assert len(data.train.batch([0], (0, 0))["target"][0]["labels"]) == 1
    assert [record["iscrowd"] for record in data.truth.objects[1]] == [1, 0]


def first(content):
    return content["annotations"][0]


def set_first(**values):
    return lambda content: first(content).update(values)


BAD = {
    "an annotation without its image": (set_first(image_id=99), "annotation 1 is of image 99, which is not there"),
    "an empty box": (set_first(bbox=[]), r"annotation 1 of image 1 \(1.png\) has the bbox \[\], not four numbers"),
    "a box of no area": (set_first(bbox=[3, 4, 0, 5]), r"the bbox \[3, 4, 0, 5\] of annotation 1 .* has no area"),
    "a negative box": (set_first(bbox=[3, 4, -2, 5]), r"the bbox \[3, 4, -2, 5\] of annotation 1 .* has no area"),
    "a box outside": (set_first(bbox=[70, 4, 9, 5]), r"\[70, 4, 9, 5\] of annotation 1 .* outside .* 64 x 64"),
    "a box of NaN": (set_first(bbox=[3, 4, float("nan"), 5]), "annotation 1 .* not four numbers"),
    "another category": (set_first(category_id=4), "annotation 1 .* is of category 4, which is not there"),
    "two of one id": (set_first(id=2), "two annotations have the id 2"),
    "no id": (lambda c: first(c).pop("id"), r"annotations\[0\] .* has no integer id"),
    "no mask": (set_first(segmentation=[]), "annotation 1 .* has no segmentation"),
    "half a point": (set_first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1 .* polygon"),
    "a line": (set_first(segmentation=[[1, 2, 3, 4]]), "annotation 1 .* polygon"),
    "a mask of another size": (
        set_first(segmentation={"size": [10, 10], "counts": [100]}),
        r"annotation 1 .* mask of the size \[10, 10\], its image has \[64, 64\]",
    ),
    "a code that ends early": (
        set_first(segmentation={"size": [64, 64], "counts": [100]}),
        "annotation 1 .* run-length code that does not fill its image",
    ),
    "half a crowd": (set_first(iscrowd=2), "annotation 1 .* has iscrowd 2"),
    "two images of one id": (lambda c: c["images"][0].update(id=2), "two images have the id 2"),
    "no file": (lambda c: c["images"][0].update(file_name="gone.png"), "image 1: there is no gone.png"),
    "a file elsewhere": (lambda c: c["images"][0].update(file_name="../1.png"), "image 1 .* not one below"),
    "no size": (lambda c: c["images"][0].pop("width"), r"image 1 \(1.png\) has no width and height"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_by_option_left_out_and_counted(root, name):
    change, message = BAD[name]
    coco_files.change(root, "train", change)
    with pytest.raises(UserError, match=message) as caught:
        open_coco(small(root), masks=True)
    assert "\n" not in str(caught.value)
    assert "data.on_bad_record skip" in str(caught.value)
    data = open_coco(small(root, on_bad_record="skip"), masks=True)
    assert len(data.train)
    assert any("left out 1 " in note or "left out 2 " in note for note in data.notes), data.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"].append({"id": 3, "name": "again"}), "two categories have the id 3"),
        (lambda c: c["categories"].append({"id": 4, "name": "disc"}), "two categories have the name 'disc'"),
        (lambda c: c.pop("images"), "needs the lists images, annotations, categories"),
        (lambda c: c.update(annotations=[]), "no image with an object to train on"),
        (lambda c: c["categories"].append({"id": 4, "name": "cat"}), "are not those of"),
    ],
)
def test_files_that_cannot_be_used(root, change, message):
    coco_files.change(root, "train", change)
    with pytest.raises(UserError, match=message):
        open_coco(small(root, on_bad_record="skip"), masks=True)


def test_boxes_are_enough_without_masks(root):
    coco_files.change(root, "train", set_first(segmentation=None))
    target = open_coco(small(root), masks=False).train.batch([0], (0, 0))["target"][0]
    assert "masks" not in target
    assert len(target["boxes"]) == 2


@pytest.mark.parametrize("damage", ["cut", "size"])
def test_an_image_that_cannot_be_read_is_named_or_skipped(root, damage):
    path = root / "train2017" / "1.png"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        Image.new("RGB", (30, 40)).save(path)
    with pytest.raises(OSError, match=r"1\.png"):
        open_coco(small(root), masks=True).train.batch([0, 1], (0, 0))
    data = open_coco(small(root, on_bad_record="skip", test_on="train"), masks=True)
    assert data.train.batch([0, 1], (0, 0))["index"].tolist() == [1, 1]
    assert data.test.batch([0, 1])["index"].tolist() == [1]
    assert data.bad_images() == ["1.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_sides": ()}, "data.short_sides"),
        ({"max_side": 40}, "data.max_side 40 is less than a shorter side of 64"),
        ({"flip": 1.5}, "data.flip 1.5"),
        ({"std": (0.0, 1.0, 1.0)}, "data.std"),
        ({"test_on": "train", "test_images": "val"}, "would be ignored"),
        ({"limit": 0}, "data.limit 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be(root, changes, message):
    with pytest.raises(UserError, match=message):
        open_coco(small(root, **changes), masks=True)


def test_what_is_missing_is_named(root):
    with pytest.raises(FileNotFoundError, match="no folder with images and annotations"):
        open_coco(small(root / "gone"), masks=True)
    with pytest.raises(FileNotFoundError, match=r"data.train_annotations x\.json"):
        open_coco(small(root, train_annotations="x.json"), masks=True)
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "other.json")
    with pytest.raises(FileNotFoundError, match=r"no val annotations; looked for annotations/instances_val2017\.json"):
        open_coco(small(root), masks=True)


def test_real_photos(data_root):
    folder = data_root / "coco_small"
    if not folder.is_dir():
        pytest.skip("coco_small is not there")
    config = CocoConfig(root=str(folder), short_sides=(128,), max_side=160, test_short_side=128, batch_size=4)
    data = open_coco(config, masks=True)
    assert [len(data.train), len(data.test), len(data.classes)] == [130, 50, 80]
    batch = next(iter(train_loader(data, config, 0, steps=1)))
    for image, target in zip(batch["image"], batch["target"], strict=True):
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            if len(rows):  # the mask lies within the box
                assert columns.min() >= box[0] - 1.5 and columns.max() <= box[2] + 1.5
                assert rows.min() >= box[1] - 1.5 and rows.max() <= box[3] + 1.5
