"""When an operator may take its own eager CPU kernel instead of the plain form that every transform knows."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_mlp.moe.kernels import in_transform, is_subclass

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
    """Whether these are plain CPU tensors and nothing compiles, traces or transforms what is computed from them.

    False under torch.compile, torch.export, tracing and autocast, for tensors of torch.func's transforms, of
    forward-mode AD and of subclasses (fake tensors), and where torch was built without oneDNN.
    """
    return bool(
        not torch.compiler.is_compiling()
        and _ONEDNN
        and torch.backends.mkldnn.enabled
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and all(t.device.type == "cpu" and not is_subclass(t) and not in_transform(t) for t in tensors)
    )
