from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets
from sparse_mlp.data.cifar import read_cifar10, rebuild_official


def write_strips(path: Path, strips: int, seed: int) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (100 * strips, 32, 32, 3), dtype=np.uint8)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(strips):
            content = io.BytesIO()
            Image.fromarray(images[100 * i : 100 * i + 100].reshape(3200, 32, 3)).save(content, "webp", lossless=True)
            file.writestr(f"{100 * i:05d}.webp", content.getvalue())
    return images.transpose(0, 3, 1, 2)


@pytest.fixture
def strips(tmp_path: Path) -> Path:
    """The first two hundred training and one hundred test images of an invented CIFAR-10."""
    np.save(tmp_path / "labels.npy", (np.arange(60_000) % 10).astype(np.uint8))
    write_strips(tmp_path / "data_batch_1.zip", 2, seed=1)
    write_strips(tmp_path / "test_batch.zip", 1, seed=2)
    return tmp_path


def test_strips_are_read_in_order_without_loss(strips: Path):
    (train, train_labels), (test, test_labels), classes = read_cifar10(strips, download=False)
    assert np.array_equal(train, write_strips(strips / "again.zip", 2, seed=1))
    assert test.shape == (100, 3, 32, 32) and len(classes) == 10
    assert np.array_equal(train_labels, np.arange(200) % 10) and np.array_equal(test_labels, np.arange(100) % 10)


def test_a_gap_between_the_batches_is_an_error(strips: Path):
    write_strips(strips / "data_batch_3.zip", 1, seed=3)
    with pytest.raises(FileNotFoundError, match="without a gap"):
        read_cifar10(strips, download=False)


def test_parts_of_the_set_do_not_make_the_official_files(strips: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="200 of the 50,000"):
        rebuild_official(strips, tmp_path / "out")


def test_a_fifth_of_cifar100_does_not_pass_for_all_of_it(tmp_path: Path):
    np.save(tmp_path / "labels_train.npy", np.zeros(3))
    with pytest.raises(FileNotFoundError, match="name it cifar100_fifth"):
        build_datasets(DataConfig(name="cifar100", root=str(tmp_path)), AugmentConfig())


def test_damaged_official_files_are_named_with_the_folder(tmp_path: Path):
    (tmp_path / CIFAR10.base_folder).mkdir()
    (tmp_path / CIFAR10.base_folder / "data_batch_1").write_bytes(b"cut short")
    with pytest.raises(FileNotFoundError, match="official md5") as error:
        read_cifar10(tmp_path, download=False)
    assert "\n" not in str(error.value)


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An invented CIFAR-100 of 20 + 10 images in the official layout, its sums in the place of the official ones."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    meta = {"fine_label_names": [f"class{i}" for i in range(100)], "coarse_label_names": ["coarse"] * 20}
    sums = {}
    for name, count in (("train", 20), ("test", 10), ("meta", 0)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = {"fine_labels": [5 * i for i in range(count)], "coarse_labels": list(range(count))}
        content = pickle.dumps(meta if name == "meta" else {"data": pixels, **labels})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    monkeypatch.setattr(CIFAR100, "url", (tmp_path / "no-such-archive").as_uri())
    return tmp_path


@pytest.mark.parametrize("download", [False, True])
def test_the_official_layout_of_cifar100(cifar100: Path, download: bool):
    config = DataConfig(name="cifar100", root=str(cifar100), download=download)  # nothing to fetch: all is there
    data = build_datasets(config, AugmentConfig(), trusted=True)
    pixels = np.random.default_rng(20).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    assert np.array_equal(data.train.images.numpy(), pixels)
    assert data.train.labels.tolist() == [5 * i for i in range(20)], "the fine ones"
    assert len(data.test) == 10 and data.classes == [f"class{i}" for i in range(100)]


def test_a_download_that_fails_is_one_line(cifar100: Path, capfd: pytest.CaptureFixture[str]):
    (cifar100 / CIFAR100.base_folder / "train").unlink()
    with pytest.raises(FileNotFoundError, match=r"CIFAR100 is not in \S+: expected .*; the download failed") as error:
        build_datasets(DataConfig(name="cifar100", root=str(cifar100), download=True), AugmentConfig(), trusted=True)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_labels_out_of_range_are_one_line(cifar100: Path, monkeypatch: pytest.MonkeyPatch):
    path = cifar100 / CIFAR100.base_folder / "train"
    content = pickle.loads(path.read_bytes())
    content["fine_labels"][3] = 100
    path.write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", hashlib.md5(path.read_bytes()).hexdigest()]])
    with pytest.raises(OSError, match=r"has training labels of cifar100 that are not integers in 0\.\.99$"):
        build_datasets(DataConfig(name="cifar100", root=str(cifar100)), AugmentConfig())


def test_as_many_labels_as_images(cifar100: Path, monkeypatch: pytest.MonkeyPatch):
    path = cifar100 / CIFAR100.base_folder / "train"
    content = pickle.loads(path.read_bytes())
    content["fine_labels"] = content["fine_labels"][1:]
    path.write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", hashlib.md5(path.read_bytes()).hexdigest()]])
    with pytest.raises(OSError, match=r"has 20 training images of cifar100 and 19 labels$"):
        build_datasets(DataConfig(name="cifar100", root=str(cifar100)), AugmentConfig())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no zip"])
def test_a_damaged_archive_is_one_line(strips: Path, content: bytes):
    (strips / "data_batch_1.zip").write_bytes(content)
    with pytest.raises(OSError, match=f"the files of cifar10 in {strips} are damaged: ") as error:
        build_datasets(DataConfig(name="cifar10", root=str(strips)), AugmentConfig())
    assert "\n" not in str(error.value)


@pytest.mark.slow  # decodes all 60,000 images twice: about 8 s
def test_official_files_are_rebuilt_byte_for_byte(data_root: Path, tmp_path: Path):
    files = rebuild_official(data_root / "cifar10", tmp_path)
    md5 = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    assert {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files} == md5
    official, strips = read_cifar10(tmp_path, download=False), read_cifar10(data_root / "cifar10", download=False)
    assert official[2] == strips[2]
    for (images, labels), (others, other_labels) in zip(official[:2], strips[:2], strict=True):
        assert np.array_equal(images, others) and np.array_equal(labels, other_labels)
