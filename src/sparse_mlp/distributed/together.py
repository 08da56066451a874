"""Evaluating a model whose weights are split: a forward needs all ranks, and these have different numbers of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from sparse_mlp.distributed.group import any_rank
from sparse_mlp.errors import UserError

T = TypeVar("T")


class Together:
    """Inside its block every rank runs a forward of `model` whenever one of them does.

    A rank that has come to the end of its `batches` repeats its last forward, and drops the result, until all have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._last: tuple[Any, dict[str, Any]] | None = None
        self._serving = False

    def __enter__(self) -> Together:
        self._hook = self.model.register_forward_pre_hook(self._announce, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _announce(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._serving:
            self._last = args, kwargs
            any_rank(True)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of this rank, for each of which there is a forward. UserError on all ranks if one has none."""
        iterator = iter(loader)
        first = next(iterator, None)
        if any_rank(first is None):
            raise UserError("there is less to evaluate on than there are processes: start torchrun with fewer")
        for batch in itertools.chain([first], iterator):
            self._last = None
            yield batch  # type: ignore[misc]
            # by another method than a call of the model: the other ranks would not know
            assert self._last is not None, f"a batch was evaluated without calling {type(self.model).__name__}"
        self._serve()

    def _serve(self) -> None:
        assert self._last is not None
        args, kwargs = self._last
        self._serving = True
        while any_rank(False):
            self.model(*args, **kwargs)
        self._serving = False
