"""Not a test: a run with a teacher on this rank."""

from __future__ import annotations

from typing import Any

from sparse_mlp.jobs.nodes import NodesRecipe
from sparse_mlp.jobs.recipe import from_json
from sparse_mlp.jobs.run import train

SPEC: dict[str, Any] = globals()["SPEC"]

train(from_json(NodesRecipe, SPEC["recipe"]), SPEC["out"], show=False)
