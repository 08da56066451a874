"""How a pair of operators, a function and its gradient, becomes a differentiable function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Gradients = Sequence[Tensor | None]


def differentiable(
    plain: Callable[..., Any],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Gradients],
    constant: tuple[int, ...] = (),
    kept: tuple[int, ...] = (),
    without_gradient: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """`forward` with a gradient.

    Args:
        plain: the definition, of the same arguments; it is differentiated where the gradient itself needs a graph.
        forward: returns the outputs.
        backward: from (inputs, kept outputs, gradients of all outputs, which inputs need one) to gradients of inputs.
        constant: numbers of the outputs that have no gradient. kept: of those that `backward` needs.
        without_gradient: in place of `forward` where no input needs a gradient.
    """

    class Kernel(torch.autograd.Function):
        generate_vmap_rule = True  # for a call in a transform with tensors that are none of its own

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*(output[i] for i in constant))
            ctx.set_materialize_grads(False)
            ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            ctx.save_for_backward(*tensors, *(output[i] for i in kept))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if other is None else other[0] for other in ctx.others]
            if torch.is_grad_enabled():
                return _plain_gradients(plain, inputs, gradients, ctx)
            return tuple(backward(inputs, list(saved), gradients, ctx.needs_input_grad))

    keep_signature(Kernel)

    def call(*args: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return Kernel.apply(*args)
        return (without_gradient or forward)(*args)

    return call


def keep_signature(function: type[torch.autograd.Function]) -> None:
    """Let the signature of `forward` be found once: torch looks for it in every call, which takes 40 us."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]


def _plain_gradients(
    plain: Callable[..., Any], inputs: list[Any], gradients: tuple[Tensor | None, ...], ctx: FunctionCtx
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated in turn."""
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]  # type: ignore[attr-defined]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(wanted, tensors, strict=True))
        result = plain(*(replaced.get(i, value) for i, value in enumerate(inputs)))
        result = result if isinstance(result, tuple) else (result,)
        return tuple(output for output, grad in zip(result, gradients, strict=False) if grad is not None)

    _, pull_back = torch.func.vjp(outputs, *(inputs[i] for i in wanted))  # type: ignore[misc]
    found = dict(zip(wanted, pull_back(tuple(grad for grad in gradients if grad is not None)), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))
