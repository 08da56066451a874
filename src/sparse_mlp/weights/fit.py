"""Whether named tensors fit a model: the one check and the one message for weights from any source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_mlp.errors import UserError

__all__ = ["CheckpointMismatch", "add_batch_counters", "check_fit", "shapes"]

Shape = tuple[int, ...]


class CheckpointMismatch(UserError):
    """Weights that do not fit. `matched`, `missing`, `unexpected` and `misshapen` are the lists of names."""

    def __init__(
        self, what: str, matched: list[str], missing: list[str], unexpected: list[str], misshapen: dict[str, str]
    ) -> None:
        self.matched, self.missing, self.unexpected, self.misshapen = matched, missing, unexpected, list(misshapen)
        parts = {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape": [f"{name} {shapes}" for name, shapes in misshapen.items()],
        }
        listed = ", ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in parts.items() if names)
        super().__init__(f"{what}: {len(matched)} matched, {listed}{_about_experts(missing, unexpected)}")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fit(actual: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Raise `CheckpointMismatch` unless `actual` has exactly the names and shapes of `expected`.

    `what` begins the message: "the weights in FILE do not fit this model".
    """
    both = [name for name in expected if name in actual]
    misshapen = {name: f"{actual[name]} for {expected[name]}" for name in both if actual[name] != expected[name]}
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    if missing or unexpected or misshapen:
        matched = [name for name in both if name not in misshapen]
        raise CheckpointMismatch(what, matched, missing, unexpected, misshapen)


def add_batch_counters(actual: dict[str, Tensor], expected: Mapping[str, Shape]) -> None:
    """Add to `actual` the `num_batches_tracked` of batch norms that old checkpoints lack, at zero as torch does.

    No result depends on them unless a batch norm's momentum is None.
    """
    for name in expected:
        norm, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" and name not in actual and f"{norm}.running_mean" in actual:
            actual[name] = torch.tensor(0)


def _about_experts(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What to do where one side has experts in the place of the other's MLP."""
    for without, with_experts, advice in (
        (unexpected, missing, "a dense model's: load them before `sparse_mlp.sparsify` gives it experts"),
        (
            missing,
            unexpected,
            "of a model with experts: call `sparse_mlp.sparsify` as for that one before you load them",
        ),
    ):
        places = {name.removesuffix("router.weight") for name in with_experts if name.endswith(".router.weight")}
        if any(name.startswith(place) for place in places for name in without):
            return f"; they are {advice}"
    return ""


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
