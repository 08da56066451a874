"""Not a test: a detector's run on this rank."""

from __future__ import annotations

from typing import Any

from sparse_mlp.jobs.detect import DetectRecipe
from sparse_mlp.jobs.recipe import from_json
from sparse_mlp.jobs.run import train

SPEC: dict[str, Any] = globals()["SPEC"]

train(from_json(DetectRecipe, SPEC["recipe"]), SPEC["out"], show=False)
