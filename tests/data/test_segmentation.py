"""Images with masks: layouts, mask values, sizes, augmentation."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from sparse_mlp.data.segmentation import IGNORE, open_segmentation
from sparse_mlp.data.segmentation_config import SegmentationConfig
from sparse_mlp.errors import UserError


def picture(seed: int, width: int = 48, height: int = 40) -> tuple[Image.Image, np.ndarray]:
    """A colour for each of three classes, in blocks of eight pixels."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 3, (height // 8, width // 8), dtype=np.uint8)
    mask = blocks.repeat(8, 0).repeat(8, 1)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    return Image.fromarray(colours[mask]), mask


def write(root: Path, name: str, seed: int, images: str = "images", masks: str = "masks", **size: int) -> None:
    image, mask = picture(seed, **size)
    for folder in (root / images, root / masks):
        folder.mkdir(parents=True, exist_ok=True)
    image.save(root / images / f"{name}.png")
    Image.fromarray(mask).save(root / masks / f"{name}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            write(tmp_path / split, f"{split}{i}", i)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    return tmp_path


def config(root: Path, **changes: object) -> SegmentationConfig:
    return SegmentationConfig(root=str(root), image_size=32, batch_size=2, **changes)  # type: ignore[arg-type]


def test_a_folder_with_splits(root):
    data = open_segmentation(config(root))
    assert data.classes == ("red", "green", "blue")
    assert (len(data.train), len(data.test)) == (4, 2)
    batch = data.test.batch([1, 0])
    assert batch["index"].tolist() == [1, 0]
    assert np.array_equal(batch["target"][1].numpy(), picture(0)[1])
    assert batch["image"][0].shape == (3, 40, 48)
    # ImageNet's normalisation of pure red.
    red = batch["image"][1][:, torch.from_numpy(picture(0)[1]) == 0]
    torch.testing.assert_close(red[:, 0], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_splits_may_be_inside_images_and_masks(root, tmp_path):
    other = tmp_path / "other"
    for split in ("train", "val"):
        write(other, f"a{split}", 1, f"images/{split}", f"masks/{split}")
    (other / "classes.txt").write_text("red\ngreen\nblue\n")
    data = open_segmentation(config(other))
    assert data.train.pairs[0].name == "images/train/atrain.png"
    assert data.test.pairs[0].name == "images/val/aval.png"


def test_without_splits_a_name_decides(root, tmp_path):
    flat = tmp_path / "flat"
    for i in range(40):
        write(flat, f"x{i}", i)
    (flat / "classes.txt").write_text("red\ngreen\nblue\n")
    before = open_segmentation(config(flat))
    assert 0 < len(before.test) < 20
    for i in range(40, 50):
        write(flat, f"x{i}", i)
    after = open_segmentation(config(flat))
    for part in ("train", "test"):
        assert {p.name for p in getattr(before, part).pairs} <= {p.name for p in getattr(after, part).pairs}


def test_a_split_of_a_folder_without_splits_is_refused(tmp_path):
    """It was once the share for the test, whatever it was called."""
    for i in range(20):
        write(tmp_path, f"x{i}", i)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(FileNotFoundError, match="no images with masks for the split 'train'"):
        open_segmentation(config(tmp_path, test_split="train"))


def test_camvid():
    if "SPARSE_MLP_DATA" not in os.environ:
        pytest.skip("SPARSE_MLP_DATA is not set")
    data = open_segmentation(SegmentationConfig("camvid", image_size=64, batch_size=4))
    assert (len(data.train), len(data.test), len(data.classes)) == (367, 233, 11)
    target = data.test.batch([0])["target"][0]
    assert target.shape == (360, 480)
    assert set(target.unique().tolist()) <= {*range(11), IGNORE}


def test_ade20k_counts_from_one(tmp_path):
    for split in ("training", "validation"):
        write(tmp_path, f"ADE_{split}", 3, f"images/{split}", f"annotations/{split}")
    data = open_segmentation(SegmentationConfig("ade20k", root=str(tmp_path), image_size=32, batch_size=1))
    expected = picture(3)[1].astype(int) - 1
    assert np.array_equal(data.test.batch([0])["target"][0], np.where(expected < 0, IGNORE, expected))
    assert len(data.classes) == 150


def test_cityscapes_has_nineteen_classes(tmp_path):
    for split in ("train", "val"):
        city = tmp_path / "leftImg8bit" / split / "aachen"
        masks = tmp_path / "gtFine" / split / "aachen"
        city.mkdir(parents=True)
        masks.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(city / "aachen_0_leftImg8bit.png")
        ids = np.zeros((32, 32), dtype=np.uint8)
        ids[:8], ids[8:16] = 7, 26  # road and car; 0 is void
        Image.fromarray(ids).save(masks / "aachen_0_gtFine_labelIds.png")
    data = open_segmentation(SegmentationConfig("cityscapes", root=str(tmp_path), image_size=32, batch_size=1))
    target = data.test.batch([0])["target"][0]
    assert [data.classes[target[0, 0]], data.classes[target[8, 0]]] == ["road", "car"]
    assert target[20, 0] == IGNORE and len(data.classes) == 19


def test_an_archive_is_as_the_folder(root):
    whole = open_segmentation(config(root)).train.batch([0, 1], (0, 0))
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for path in sorted((root / "train").rglob("*.png")):
            archive.write(path, path.relative_to(root / "train"))
            path.unlink()
    (root / "train" / "images").rmdir()
    (root / "train" / "masks").rmdir()
    (root / "train").rmdir()
    zipped = open_segmentation(config(root)).train.batch([0, 1], (0, 0))
    assert torch.equal(whole["image"], zipped["image"]) and torch.equal(whole["target"], zipped["target"])


# Augmentation


def test_a_batch_is_a_function_of_seed_and_epoch(root):
    train = open_segmentation(config(root)).train
    first = train.batch([0, 1], (0, 0))
    train.batch([2, 3], (0, 0))
    again = train.batch([1, 0], (0, 0))
    assert torch.equal(first["image"], again["image"].flip(0))
    assert not torch.equal(first["image"], train.batch([0, 1], (0, 1))["image"])
    assert not torch.equal(first["image"], train.batch([0, 1], (1, 0))["image"])


def test_image_and_mask_are_cut_alike(root):
    """With pure colours the class of a pixel can be read from the image."""
    plain = config(root, scale=(1.0, 1.0), photometric=0.0, max_class_share=1.0)
    train = open_segmentation(plain).train
    for epoch in range(5):
        batch = train.batch([0, 1, 2, 3], (0, epoch))
        assert batch["image"].shape == (4, 3, 32, 32) and batch["target"].shape == (4, 32, 32)
        assert torch.equal(batch["image"].argmax(dim=1), batch["target"])


def test_a_small_image_is_padded_and_the_padding_ignored(root):
    small = config(root, scale=(0.5, 0.5), photometric=0.0, flip=0.0)
    batch = open_segmentation(small).train.batch([0], (0, 0))
    assert (batch["target"][0, 20:] == IGNORE).all() and (batch["target"][0, :, 24:] == IGNORE).all()
    assert (batch["target"][0, :20, :24] != IGNORE).all()


def test_a_crop_of_one_class_is_drawn_again(tmp_path):
    mask = np.zeros((64, 640), dtype=np.uint8)
    mask[:, 320:352] = 1
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / split / folder).mkdir(parents=True)
            Image.fromarray(mask).save(tmp_path / split / folder / "a.png")
    (tmp_path / "classes.txt").write_text("far\nnear\n")
    plain = {"scale": (1.0, 1.0), "photometric": 0.0, "flip": 0.0}
    shares = {}
    for share in (1.0, 0.9):
        train = open_segmentation(config(tmp_path, max_class_share=share, **plain)).train
        targets = torch.cat([train.batch([0], (0, epoch))["target"] for epoch in range(60)])
        shares[share] = (targets == 1).float().mean().item()
    assert shares[0.9] > 2 * shares[1.0]


# Errors


def test_what_does_not_fit_is_one_line_with_the_file(root):
    mask = root / "val" / "masks" / "val0.png"

    def error() -> str:
        with pytest.raises(OSError) as caught:
            open_segmentation(config(root)).test.batch([0])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    Image.fromarray(np.full((40, 48), 7, dtype=np.uint8)).save(mask)
    assert error() == f"mask {mask} has the value 7: it stands for none of the 3 classes"
    Image.fromarray(np.zeros((40, 40), dtype=np.uint8)).save(mask)
    assert error() == f"mask {mask} is 40 x 40, its image 48 x 40"
    Image.new("RGB", (48, 40)).save(mask)
    assert error() == f"mask {mask} has colours (RGB): its pixels should be class numbers"
    Image.fromarray(np.full((40, 48), 300, dtype=np.uint16)).save(mask)
    assert error() == f"mask {mask} has the value 300: class numbers end at 255"
    mask.write_bytes(b"no image")
    assert error().startswith(f"cannot read mask {mask}: ")


def test_a_palette_holds_class_numbers(root):
    mask = root / "val" / "masks" / "val0.png"
    image = Image.new("P", (48, 40))
    image.putdata(picture(0)[1].ravel().tolist())
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    image.save(mask)
    assert np.array_equal(open_segmentation(config(root)).test.batch([0])["target"][0], picture(0)[1])


@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_a_turned_photo_keeps_its_mask(root, drawn_on):
    """A camera stores the photo on its side and says so; masks are drawn on what people see, or on what is stored."""
    image, mask = picture(0)
    stored = image.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    folder = root / "val"
    stored.save(folder / "images" / "val0.png", exif=exif)
    if drawn_on == "stored":
        Image.fromarray(mask).transpose(Image.Transpose.ROTATE_90).save(folder / "masks" / "val0.png")
    batch = open_segmentation(config(root)).test.batch([0])
    assert np.array_equal(batch["target"][0], mask)
    assert torch.equal(batch["image"][0].argmax(dim=0).to(torch.uint8), torch.from_numpy(mask))


def test_bad_images_are_skipped_and_counted_where_allowed(root):
    (root / "train" / "images" / "train1.png").write_bytes(b"")
    (root / "val" / "images" / "val0.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"train1\.png"):
        open_segmentation(config(root)).train.batch([1], (0, 0))
    data = open_segmentation(config(root, on_bad_image="skip"))
    assert data.train.batch([0, 1], (0, 0))["index"].tolist() == [0, 2]
    assert data.test.batch([0, 1])["index"].tolist() == [1]
    assert data.train.bad_images == ["images/train1.png"] and data.test.bad_images == ["images/val0.png"]


def test_images_without_masks_are_named(root):
    (root / "train" / "masks" / "train3.png").unlink()
    data = open_segmentation(config(root))
    assert len(data.train) == 3
    assert data.notes == [f"1 images of {root / 'train'} have no mask: images/train3.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "nowhere"}, "there is no folder nowhere: name the set's with --data.root"),
        ({"test_split": "vall"}, "has no images with masks for the split 'vall'"),
        ({"test_share": 0.5}, "data.test_share 0.5 would be ignored: .* has splits"),
        ({"num_images": 9}, "data.num_images 9 is more than the 4 training images"),
        ({"image_size": 8}, "data.image_size 8 must be at least 32"),
        ({"flip": 1.5}, "data.flip 1.5 must be at least 0 and at most 1"),
        ({"scale": (2.0, 0.5)}, "data.scale 2.0 0.5 must be two numbers"),
        ({"name": "camvid", "ignore": 3}, "data.ignore 3 would be ignored: camvid has values of its own"),
    ],
)
def test_mistakes_are_one_line(root, changes, message):
    values = {"root": str(root), "image_size": 32, "batch_size": 2} | changes
    with pytest.raises((UserError, OSError), match=message.replace("(", r"\(")):
        open_segmentation(SegmentationConfig(**values))


def test_a_folder_without_class_names_says_how_to_give_them(root):
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no classes\.txt: names of the classes, a line each"):
        open_segmentation(config(root))


def test_workers_read_archives_of_their_own(root):
    """A pickled set opens its archive anew."""
    import pickle

    buffer = io.BytesIO()
    data = open_segmentation(config(root))
    pickle.dump([pair.image for pair in data.train.pairs], buffer)
    restored = pickle.loads(buffer.getvalue())
    assert restored[0][0].names == data.train.pairs[0].image[0].names
