"""Balance without a loss: a bias on each expert's score, moved against its load (DeepSeek-V3, section 2.1.2).

The bias takes part in the choice of the K experts and not in their gates. After each step b_e grows by `rate` if fewer
items than the mean chose expert e, and falls by as much if more did ("Auxiliary-loss-free load balancing", Wang et al.
2024, algorithm 1). A step is a backward here, so that any loop does it and a recomputed forward changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bias_step(chosen_E: Tensor, rate: float) -> Tensor:
    """rate x sign(mean load - load) of each expert. (E,) -> (E,)."""
    load_E = chosen_E.to(torch.float32)
    return rate * (load_E.mean() - load_E).sign()


class _MoveInBackward(torch.autograd.Function):
    @staticmethod
    def forward(output: Tensor, bias_E: Tensor, step_E: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        # not saved for backward, where a bias that another backward moved since would be an error
        ctx.bias_E, ctx.step_E = inputs[1:]

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        ctx.bias_E.add_(ctx.step_E)
        return grad_output, None, None


def move_in_backward(output: Tensor, bias_E: Tensor, step_E: Tensor) -> Tensor:
    """`output` unchanged; backward through it also adds `step_E` to `bias_E`."""
    return _MoveInBackward.apply(output, bias_E, step_E)
