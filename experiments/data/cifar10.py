"""From lossless WebP strips to the official CIFAR-10 python files, byte for byte (checked by md5).

    python -m experiments.data.cifar10 SOURCE OUT     # writes OUT/cifar-10-batches-py/; --data.root OUT reads it

SOURCE holds data_batch_1.zip ... data_batch_5.zip, test_batch.zip, labels.npy, filenames.txt.xz and batches.meta.
Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from experiments.data.strips import read_strips, run_command
from sparse_mlp.errors import UserError

_BATCH = 10_000  # images in one official file


def rebuild_cifar10(source: Path, out: Path) -> list[Path]:
    """Write the official cifar-10-batches-py/ into `out`; returns its seven files.

    UserError if a file would not have the official md5 (nothing is written then under that name); FileNotFoundError
    naming the file if one of the source is missing.
    """
    md5 = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    labels = np.load(source / "labels.npy")
    names = lzma.decompress((source / "filenames.txt.xz").read_bytes()).split(b"\n")
    folder = out / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for k, (name, expected) in enumerate(md5.items()):
        images, part = read_strips([source / f"{name}.zip"]), slice(_BATCH * k, _BATCH * (k + 1))
        title = b"training batch %d of 5" % (k + 1) if k < 5 else b"testing batch 1 of 1"
        content = _python2_batch(title, labels[part], images, names[part])
        written.append(_write_checked(folder / name, content, expected))
    meta = CIFAR10.meta
    written.append(_write_checked(folder / meta["filename"], (source / "batches.meta").read_bytes(), meta["md5"]))
    return written


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


def main(argv: Sequence[str] | None = None) -> int:
    def convert(source: Path, out: Path) -> str:
        files = rebuild_cifar10(source, out)
        return f"{len(files)} files with the official md5 in {files[0].parent}"

    return run_command(convert, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
