"""The kinds of run by name. A kind is imported when it is first used: graphs need packages that images do not."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from sparse_mlp.errors import UserError

if TYPE_CHECKING:
    from sparse_mlp.jobs.job import Job

_KINDS: dict[str, str | type[Job]] = {
    "classify": "sparse_mlp.jobs.classify:ClassifyJob",
    "knn": "sparse_mlp.jobs.knn:KnnJob",
    "pretrain": "sparse_mlp.jobs.pretrain:PretrainJob",
    "detect": "sparse_mlp.jobs.detect:DetectJob",
    "nodes": "sparse_mlp.jobs.nodes:NodesJob",
    "segment": "sparse_mlp.jobs.segment:SegmentJob",
}


def register(job: type[Job]) -> type[Job]:
    """Register a kind of run under its recipe's `kind`; usable as a decorator.

    ValueError if another class has that name.
    """
    kind = job.recipe_type.kind
    if _KINDS.get(kind, job) is not job:
        raise ValueError(f"there is a kind of run {kind!r} already")
    _KINDS[kind] = job
    return job


def job_type(kind: str) -> type[Job]:
    """The job class of a kind. UserError with the nearest names if there is none."""
    if kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1)
        raise UserError(
            f"unknown kind of run {kind!r}; " + (f"nearest: {near[0]}" if near else f"known: {', '.join(_KINDS)}")
        )
    job = _KINDS[kind]
    if isinstance(job, str):
        module, name = job.split(":")
        job = _KINDS[kind] = getattr(importlib.import_module(module), name)
    return job
