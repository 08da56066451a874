"""A pytest plugin that turns timm's own `tests/test_models.py` on the models of this package.

timm's tests take their names from timm's registry when the module is imported, so the listing is narrowed before that.
The names are read from the environment variable TIMM_TEST_NAMES, separated by spaces.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import pytest
import timm

import sparse_mlp  # noqa: F401 - registers the models

NAMES = os.environ["TIMM_TEST_NAMES"].split()
TOKENS = "sparse_mlp_*"  # features are (B, S, C), as those of timm's "*mixer_*"


def _with_tokens(filters: str | Sequence[str]) -> list[str]:
    filters = [filters] if isinstance(filters, str) else list(filters)
    return [*filters, TOKENS] if "*mixer_*" in filters else filters


def _list_models(
    filter: str | Sequence[str] = "",
    module: Any = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    **_: Any,
) -> list[str]:
    """Those of NAMES that fit; `module` lists timm's files with intermediates, which all of our models have."""
    if pretrained:  # those tests fetch the weights
        return []
    wanted, unwanted = _with_tokens(filter or "*"), _with_tokens(exclude_filters)

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return [name for name in NAMES if fits(name, wanted) and not fits(name, unwanted)]


timm.list_models = _list_models
timm.list_pretrained = lambda *args, **kwargs: []


def _model_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("model_name") if callspec else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of timm's single models."""
    ours = [item for item in items if _model_of(item) in NAMES]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
