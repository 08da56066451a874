"""All-MLP vision models with conditional computation.

Importing the package has one effect: its models are in timm's registry, so that `timm.create_model` finds them.

    run = sparse_mlp.train(sparse_mlp.recipe("digits_sparse", train=dict(epochs=5)), out="runs/digits")
    run.metrics["top1"], run.predict("photos/"), run.report()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_mlp import models  # noqa: F401

if TYPE_CHECKING:
    from sparse_mlp.jobs import Run, resume, train
    from sparse_mlp.moe import MoeMlp
    from sparse_mlp.recipes import recipe
    from sparse_mlp.weights import sparsify

__version__ = "0.1.0"

__all__ = ["MoeMlp", "Run", "recipe", "resume", "sparsify", "train"]

_HOMES = {
    "MoeMlp": "moe",
    "Run": "jobs",
    "recipe": "recipes",
    "resume": "jobs",
    "sparsify": "weights",
    "train": "jobs",
}


def __getattr__(name: str) -> Any:
    """Import the training code on first use, as models do not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_mlp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparse_mlp.{_HOMES[name]}"), name)
