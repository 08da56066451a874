"""CIFAR-10 and CIFAR-100: the official python files, and a lossless layout of WebP strips that rebuilds them.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import io
import lzma
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from sparse_mlp.errors import UserError

Split = tuple[np.ndarray, np.ndarray]
"""Images (N, 3, 32, 32) uint8 and labels (N,)."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_STRIP = 100  # images one under the other in one WebP file


def read_official(dataset: type[CIFAR10], root: Path, download: bool) -> tuple[Split, Split, list[str]]:
    """Train split, test split and class names from the official python layout in `root`, checked against its md5.

    Raises FileNotFoundError, naming what is expected where, if the files are missing or damaged and cannot be fetched.
    """
    try:
        train, test = (dataset(str(root), train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        wanted = f"{root / dataset.base_folder}/ with {dataset.train_list[0][0]} ... {dataset.test_list[0][0]}"
        advice = (
            f"the download failed ({_first_line(error)})"
            if download
            else "--data.download on the command line fetches it"
        )
        raise FileNotFoundError(
            f"{dataset.__name__} is not in {root}: expected {wanted} (official md5); {advice}"
        ) from error
    splits = [(np.ascontiguousarray(d.data.transpose(0, 3, 1, 2)), np.asarray(d.targets)) for d in (train, test)]
    return splits[0], splits[1], list(train.classes)


def read_cifar10(root: Path, download: bool) -> tuple[Split, Split, list[str]]:
    """CIFAR-10 from either layout: `root` holds cifar-10-batches-py/ or data_batch_1.zip ... with labels.npy.

    Trailing training batches of the strip layout may be missing; there are then fewer training images.
    """
    if not (root / "labels.npy").is_file():
        return read_official(CIFAR10, root, download)
    labels = np.load(root / "labels.npy")
    archives = [path for k in range(1, 6) if (path := root / f"data_batch_{k}.zip").is_file()]
    if len(labels) != 60_000 or not archives or archives[-1].name != f"data_batch_{len(archives)}.zip":
        raise FileNotFoundError(f"{root} needs labels.npy of 60,000 labels and data_batch_1.zip onwards without a gap")
    train, test = _read_strips(archives), _read_strips([root / "test_batch.zip"])
    return (train, labels[: len(train)]), (test, labels[50_000:][: len(test)]), list(CIFAR10_CLASSES)


def read_cifar100(root: Path, download: bool) -> tuple[Split, Split, list[str]]:
    """CIFAR-100, fine labels, from the official python layout."""
    if (root / "labels_train.npy").is_file():
        raise FileNotFoundError(f"{root} holds the balanced fifth of CIFAR-100, not all of it: name it cifar100_fifth")
    return read_official(CIFAR100, root, download)


def read_cifar100_fifth(root: Path, download: bool) -> tuple[Split, Split, list[str]]:
    """A class-balanced fifth of CIFAR-100 (10,000 + 2,000 images) as strips: not comparable to the full set."""
    names = root / "classes.txt"
    if not names.is_file():
        raise FileNotFoundError(
            f"cifar100_fifth is not in {root}: expected classes.txt, train.zip, labels_train.npy ..."
        )
    train, test = (
        (_read_strips([root / f"{split}.zip"]), np.load(root / f"labels_{split}.npy")) for split in ("train", "test")
    )
    return train, test, names.read_text().split()


def rebuild_official(root: Path, out: Path) -> list[Path]:
    """Write the official cifar-10-batches-py/ into `out` from the strip layout in `root`; -> the seven files.

    Raises ValueError if a file would not have the official md5 (nothing is written then under that name).
    """
    (train, train_labels), (test, test_labels), _ = read_cifar10(root, download=False)
    if len(train) != 50_000:
        raise UserError(f"{root} holds {len(train):,} of the 50,000 training images; the official files need all")
    images, labels = np.concatenate((train, test)), np.concatenate((train_labels, test_labels))
    names = lzma.decompress((root / "filenames.txt.xz").read_bytes()).split(b"\n")
    md5 = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    folder = out / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for k, (name, expected) in enumerate(md5.items()):
        part = slice(10_000 * k, 10_000 * (k + 1))
        title = b"training batch %d of 5" % (k + 1) if k < 5 else b"testing batch 1 of 1"
        content = _python2_batch(title, labels[part], images[part], names[part])
        written.append(_write_checked(folder / name, content, expected))
    meta = CIFAR10.meta
    written.append(_write_checked(folder / meta["filename"], (root / "batches.meta").read_bytes(), meta["md5"]))
    return written


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_strips(archives: list[Path]) -> np.ndarray:
    """All images of some zips of strips, in order, as (N, 3, 32, 32) uint8."""

    def decode(content: bytes) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        return pixels.reshape(_STRIP, 32, 32, 3).transpose(0, 3, 1, 2)

    strips: list[np.ndarray] = []
    for archive in archives:
        with zipfile.ZipFile(archive) as file, ThreadPoolExecutor(2) as pool:
            strips += pool.map(decode, [file.read(name) for name in sorted(file.namelist())])
    return np.concatenate(strips)


def _write_checked(path: Path, content: bytes, md5: str) -> Path:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(f"{path.name} would have md5 {found}, the official one is {md5}: the source files are damaged")
    path.write_bytes(content)
    return path


def _python2_batch(title: bytes, labels: np.ndarray, images: np.ndarray, names: list[bytes]) -> bytes:
    """One batch as Python 2's cPickle wrote it (protocol 2), which today's pickle cannot write byte for byte."""
    rows = images.tobytes()
    shape = b"K\x01M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", images[0].size) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + _memo(10) + b"U\x02u1K\x00K\x01\x87R" + _memo(11)
    dtype += b"(K\x03U\x01|NNNJ" + struct.pack("<i", -1) + b"J" + struct.pack("<i", -1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + _memo(7) + b"cnumpy\nndarray\n" + _memo(8)
    array += b"K\x00\x85U\x01b\x87R" + _memo(9) + b"(" + shape + dtype + b"\x89T" + struct.pack("<I", len(rows)) + rows
    entries = (
        _text(b"batch_label", 2) + _text(title, 3),
        _text(b"labels", 4) + _list([b"K" + bytes([label]) for label in labels], 5),
        _text(b"data", 6) + array + b"tb",
        _text(b"filenames", 12) + _list([_text(name, 14 + i) for i, name in enumerate(names)], 13),
    )
    return b"\x80\x02}" + _memo(1) + b"(" + b"".join(entries) + b"u."


def _memo(slot: int) -> bytes:
    """The opcode that remembers the last object under a number."""
    return b"q" + bytes([slot]) if slot < 256 else b"r" + struct.pack("<I", slot)


def _text(value: bytes, slot: int) -> bytes:
    return b"U" + bytes([len(value)]) + value + _memo(slot)


def _list(items: list[bytes], slot: int) -> bytes:
    parts = (b"(" + b"".join(items[start : start + 1000]) + b"e" for start in range(0, len(items), 1000))
    return b"]" + _memo(slot) + b"".join(parts)
