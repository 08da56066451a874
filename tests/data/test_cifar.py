from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets
from sparse_mlp.data.cifar import read_cifar


def test_damaged_official_files_are_named_with_the_folder(tmp_path: Path):
    (tmp_path / CIFAR10.base_folder).mkdir()
    (tmp_path / CIFAR10.base_folder / "data_batch_1").write_bytes(b"cut short")
    with pytest.raises(FileNotFoundError, match="official md5") as error:
        read_cifar(CIFAR10, tmp_path, download=False)
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


@pytest.mark.slow  # writes the official files from other ones where they are not there: about 8 s
def test_the_official_cifar10_is_read_in_its_order(cifar10_root: Path):
    (train, labels), (test, test_labels), classes = read_cifar(CIFAR10, cifar10_root, download=False)
    assert train.shape == (50_000, 3, 32, 32) and test.shape == (10_000, 3, 32, 32) and train.dtype == np.uint8
    assert classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], "as published"
    assert test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
