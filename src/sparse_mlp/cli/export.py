"""`sparse-mlp export`: from a run folder to a file for timm, onnxruntime or torch without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparse_mlp import jobs
from sparse_mlp.cli.output import console
from sparse_mlp.cli.parse import parse

_DESCRIPTION = """Write the model of a run as a file that is used without this package.

    sparse-mlp export runs/digits_sparse backbone.safetensors
    sparse-mlp export runs/digits_sparse model.onnx --to onnx
    sparse-mlp export runs/digits_sparse small.onnx --to onnx --int8 --weight-only

timm: the backbone as bare weights without a classifier. onnx, torch-export: the whole classifier or segmenter as a
program, which is compared with the model. The newest checkpoint is taken, with the averaged weights where the run kept
them. The code that uses the file is printed."""


@dataclass(frozen=True)
class ExportArguments:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """File to write; its name ends in .safetensors (timm), .onnx or .pt2 (torch-export)."""

    to: str = "timm"
    """timm, onnx or torch-export."""

    int8: bool = False
    """Weights of matrix products in 8 bits (ONNX); prints the accuracy that is kept on the run's test set."""

    weight_only: bool = False
    """With --int8: leave the activations in float32. Left out: they are in 8 bits too, which is faster."""

    trust_data: bool = False
    """With --int8: open the data that the run names even if that can execute or fetch something."""


def run(arguments: list[str]) -> int:
    given = parse(ExportArguments, arguments, prog="export", description=_DESCRIPTION)
    options: dict[str, Any] = {name: True for name in ("int8", "weight_only", "trust_data") if getattr(given, name)}
    console().print(jobs.Run(given.run).export(given.target, given.to, **options), markup=False, soft_wrap=True)
    return 0
