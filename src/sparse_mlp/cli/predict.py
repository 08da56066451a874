"""`sparse-mlp predict`: the classes a trained run sees in image files."""

from __future__ import annotations

import glob
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torchvision.datasets.folder import IMG_EXTENSIONS

from sparse_mlp import recipes
from sparse_mlp.cli.parse import parse
from sparse_mlp.cli.showing import console, table
from sparse_mlp.data import BadImageError, InputSpec, read_image
from sparse_mlp.errors import UserError

_BATCH = 64


@dataclass(frozen=True)
class PredictArguments:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a trained run."""

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files, folders of images, or quoted patterns such as 'photos/*.jpg'."""

    top: int = 5
    """How many classes to show for each image."""

    checkpoint: Path | None = None
    """Other weights than the newest of the run."""


def run(arguments: list[str]) -> int:
    description = "Classify image files with a trained run: the likeliest classes of each and their probabilities."
    given = parse(PredictArguments, arguments, prog="predict", description=description)
    if given.top < 1:
        raise UserError(f"--top {given.top} must be at least 1")
    if not given.images:
        raise UserError("no image given: sparse-mlp predict RUN IMAGE...")
    files = [file for pattern in given.images for file in _find(pattern)]
    spec = recipes.load_inputs(given.run)
    model = recipes.load_model(recipes.load(given.run).model, spec, given.checkpoint or given.run)
    shown = table("image", *(f"{n}." for n in range(1, min(given.top, len(spec.classes)) + 1)))
    readable = 0
    for start in range(0, len(files), _BATCH):
        found = _read(files[start : start + _BATCH], spec)
        readable += len(found)
        if found:
            for file, shares in zip(found, _classify(model, list(found.values())), strict=True):
                best = shares.topk(len(shown.columns) - 1)
                cells = (f"{spec.classes[i]} {share:.1%}" for share, i in zip(*best, strict=True))
                shown.add_row(str(file), *cells)
    if readable:
        console().print(shown)
    return 0 if readable == len(files) else 2


def _find(pattern: str) -> list[Path]:
    """The files that an argument stands for; FileNotFoundError if there are none."""
    path = Path(pattern)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise FileNotFoundError(f"there are no images in {path}")
        return found
    if path.is_file():
        return [path]
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
    found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise FileNotFoundError(f"there is no image {pattern}")
    return found


def _read(files: list[Path], spec: InputSpec) -> dict[Path, torch.Tensor]:
    """The images that can be read; a line on standard error for each of the others."""
    found = {}
    for file in files:
        try:
            found[file] = spec.transform(read_image(file, spec.channels))
        except BadImageError as error:
            sys.stderr.write(f"sparse-mlp: error: {error}\n")
    return found


@torch.no_grad()
def _classify(model: torch.nn.Module, images: list[torch.Tensor]) -> torch.Tensor:
    """Probabilities (B, classes)."""
    return model(torch.stack(images)).float().softmax(1)
