"""When an operator may take its own eager CPU kernel instead of the plain form that every transform knows."""

from __future__ import annotations

import torch
from torch import Tensor

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def runs_eagerly_on_cpu(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors and nothing records, transforms or counts operations now.

    False under torch.compile, torch.export, tracing, autocast, torch.func, forward-mode AD, any TorchDispatchMode (fake
    tensors, FLOP counters), for tensor subclasses, and where torch was built without oneDNN.
    """
    return bool(
        not torch.compiler.is_compiling()
        and _ONEDNN
        and torch.backends.mkldnn.enabled
        and not torch.jit.is_tracing()
        and all(t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.maybe_current_level()
        and torch.autograd.forward_ad._current_level < 0
    )
