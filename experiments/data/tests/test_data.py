from __future__ import annotations

import hashlib
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from experiments.data import cifar10, cifar100_fifth
from experiments.data.strips import read_strips
from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets


def write_strips(path: Path, strips: int, seed: int) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (100 * strips, 32, 32, 3), dtype=np.uint8)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(strips):
            content = io.BytesIO()
            Image.fromarray(images[100 * i : 100 * i + 100].reshape(3200, 32, 3)).save(content, "webp", lossless=True)
            file.writestr(f"{100 * i:05d}.webp", content.getvalue())
    return images.transpose(0, 3, 1, 2)


def test_strips_are_read_in_order_without_loss(tmp_path: Path):
    archives = [tmp_path / f"{i}.zip" for i in range(2)]
    images = [write_strips(archives[0], 2, seed=1), write_strips(archives[1], 1, seed=2)]
    assert np.array_equal(read_strips(archives), np.concatenate(images))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no zip", None])
def test_what_is_damaged_or_missing_is_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "classes.txt").write_text("cat dog")
    if content is not None:
        (tmp_path / "train.zip").write_bytes(content)
    assert cifar100_fifth.main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "train.zip" in error and len(error.splitlines()) == 1


def test_a_fifth_becomes_a_folder_of_images(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "classes.txt").write_text("cat\ndog\n")
    images = {}
    for split, seed in (("train", 1), ("test", 2)):
        images[split] = write_strips(source / f"{split}.zip", 1, seed)
        np.save(source / f"labels_{split}.npy", (np.arange(100) % 2).astype(np.uint8))
    assert cifar100_fifth.write_fifth(source, out) == 200
    config = DataConfig(name="folder", root=str(out), image_size=32, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    data = build_datasets(config, AugmentConfig())
    assert (len(data.train), len(data.test), data.classes) == (100, 100, ["cat", "dog"])
    assert np.array_equal((data.test.batch([0])["image"] * 255).round().numpy()[0], images["test"][0])
    assert data.test.batch(range(100))["target"].tolist() == [0] * 50 + [1] * 50


def test_images_that_are_not_the_official_ones_write_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_strips(tmp_path / "data_batch_1.zip", 1, seed=1)
    np.save(tmp_path / "labels.npy", (np.arange(60_000) % 10).astype(np.uint8))
    (tmp_path / "filenames.txt.xz").write_bytes(lzma.compress(b"\n".join([b"a.png"] * 60_000)))
    assert cifar10.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "data_batch_1 would have md5" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("data_batch_*"))


@pytest.mark.slow  # decodes all 60,000 images: about 5 s
def test_official_files_are_written_byte_for_byte(cifar10_root: Path, data_root: Path):
    if cifar10_root == data_root / "cifar10":
        pytest.skip("the official files are there already")
    md5 = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    files = (cifar10_root / CIFAR10.base_folder).iterdir()
    assert {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files} == md5
