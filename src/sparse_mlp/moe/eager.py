"""When an operator may take its own eager CPU kernel instead of the plain form that every transform knows."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products are faster by oneDNN than by MKL, which torch calls: on x86 processors not Intel's.

    Measured on an AMD EPYC, where MKL reaches half the speed, and on an Intel Xeon, where an MoE layer takes a tenth
    longer on oneDNN's (benchmarks/moe_layer.py prints both). Decided by the maker's name, not by a stopwatch: a run
    must give the same bits twice.
    """
    if not _ONEDNN or not torch.backends.mkl.is_available() or sys.platform == "darwin":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" not in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())


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
