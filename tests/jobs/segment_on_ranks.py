"""Not a test: a segmentation run on this rank."""

from __future__ import annotations

from typing import Any

from sparse_mlp.jobs.recipe import from_json
from sparse_mlp.jobs.run import resume, train
from sparse_mlp.jobs.segment import SegmentRecipe

SPEC: dict[str, Any] = globals()["SPEC"]

if SPEC.get("resume"):
    resume(SPEC["out"], show=False)
else:
    train(from_json(SegmentRecipe, SPEC["recipe"]), SPEC["out"], show=False)
