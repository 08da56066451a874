"""`sparse-mlp rebuild-cifar10`: from the lossless strips to the files that torchvision and others read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp.cli.parse import parse
from sparse_mlp.cli.showing import console
from sparse_mlp.data.cifar import rebuild_official


@dataclass(frozen=True)
class RebuildArguments:
    root: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ROOT")]
    """Folder with data_batch_1.zip ... test_batch.zip, labels.npy, filenames.txt.xz and batches.meta."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder in which cifar-10-batches-py/ is written; then --data.root OUT reads it."""


def run(arguments: list[str]) -> int:
    description = "Write the official CIFAR-10 python files, byte for byte (checked by md5), from the WebP layout."
    given = parse(RebuildArguments, arguments, prog="rebuild-cifar10", description=description)
    files = rebuild_official(given.root, given.out)
    console().print(f"{len(files)} files with the official md5 in {files[0].parent}", soft_wrap=True)
    return 0
