"""Faster forms of functions that `moe/` writes in plain torch: one file a backend.

A function marked `accelerated` is the definition. A call of it runs a backend's operator instead where one is faster
for these arguments: `cpu`, C kernels for float32 on a CPU in eager mode, or `grouped`, torch's grouped matrix products
on other devices, other types and under torch.compile. The definition itself runs under torch.func and forward-mode AD,
in torch.export (a program must load where this package is not), for float64, tensor subclasses and fake tensors, on the
meta device, and for everything with SPARSE_MLP_KERNELS=plain in the environment. Where a gradient is differentiated in
turn, it is the definition's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

F = TypeVar("F", bound=Callable[..., Any])

VARIABLE = "SPARSE_MLP_KERNELS"
CHOICES = ("auto", "plain")


def accelerated(plain: F) -> F:
    """The function, or a backend's operator of its name where there is one for the arguments of a call."""

    @wraps(plain)
    def call(*args: Any) -> Any:
        return _implementation(plain, args)(*args)

    return call  # type: ignore[return-value]


def state() -> str:
    """Which kernels run on a CPU, in a few words: "compiled", "plain", or why there are no compiled ones."""
    from sparse_mlp.moe.kernels import library

    if setting() == "plain":
        return f"plain, by {VARIABLE}=plain"
    loaded = library.load()
    return loaded if isinstance(loaded, str) else "compiled"


@torch.compiler.assume_constant_result
def setting() -> str:
    """The value of SPARSE_MLP_KERNELS. ValueError if it is none of the choices."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}; got {value!r}")
    return value


def _implementation(plain: F, args: tuple[Any, ...]) -> Callable[..., Any]:
    from sparse_mlp.moe.kernels import cpu, grouped

    if torch.compiler.is_exporting() or setting() == "plain":
        return plain
    if torch.compiler.is_compiling():
        return grouped.OPERATORS.get(plain.__name__, plain) if grouped.serves(args) else plain
    if any(isinstance(arg, Tensor) and (is_subclass(arg) or in_transform(arg)) for arg in args):
        return plain
    for backend in (cpu, grouped):
        if plain.__name__ in backend.OPERATORS and backend.serves(args):
            return backend.OPERATORS[plain.__name__]
    return plain


def in_transform(tensor: Tensor) -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work on this tensor."""
    if torch.compiler.is_compiling():
        return False
    return torch.func.debug_unwrap(tensor) is not tensor or unpack_dual(tensor).tangent is not None


def is_subclass(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter)
