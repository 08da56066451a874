"""An MoE layer's kernels in C: float32 on a CPU, each in one pass over memory. `rows` has the experts' part as torch
operators, `router` and `dispatch` the rest; what is here computes the same.

The machine's C compiler makes the library from kernels.c when it is first needed, for the processor it then runs on:
half a second, once, for it is kept in the user's cache. Where there is no compiler, or SPARSE_MLP_C_KERNELS=0 says so,
torch does the work; `state` tells which, and a run's environment.json keeps it. Memory and threads are torch's: the
OpenMP library that torch has loaded serves this one too.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_mlp.moe.eager import runs_eagerly_on_cpu

_log = logging.getLogger(__name__)

FEW = 128  # rows of an expert up to which products of our own are faster than a library's
LARGE = 2**23  # numbers of a weight's gradient, from which on it is written past the caches
MOST_EXPERTS = 64  # beyond, a library makes the router's logits faster

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared"]
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {  # the number of threads is the last one of each
    "gather": [_POINTER] * 3 + [_SIZE] * 2 + [_INT],
    "combine": [_POINTER] * 6 + [_SIZE] * 4 + [_INT],
    "bias_gelu": [_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2,
    "bias_gelu_backward": [_POINTER] * 6 + [_SIZE] * 2 + [_INT] * 2,
    "gather_gated": [_POINTER] * 9 + [_SIZE] * 2 + [_INT],
    "route": [_POINTER] * 4 + [_FLOAT] + [_POINTER] * 5 + [_SIZE] * 4 + [_INT],
    "route_backward": [_POINTER] * 2 + [_FLOAT] + [_POINTER] * 4 + [_SIZE] * 3 + [_INT],
    "scores_backward": [_POINTER] * 6 + [_SIZE] * 3 + [_INT],
    "sort_by_expert": [_POINTER] * 3 + [_SIZE] * 2 + [_INT],
    "few_rows_experts": [_POINTER] * 10 + [_SIZE] * 3 + [_INT] * 2,
    "few_rows_experts_backward": [_POINTER] * 21 + [_SIZE] * 3 + [_INT] * 3,
}


def serves(*tensors: Tensor) -> bool:
    """Whether these functions may take these tensors: all float32 on a CPU, run eagerly, and there is a library."""
    if not runs_eagerly_on_cpu(*tensors) or any(tensor.dtype != torch.float32 for tensor in tensors):
        return False
    return not isinstance(_load(), str)


def state() -> str:
    """ "compiled", or why not, in a few words."""
    library = _load()
    return library if isinstance(library, str) else "compiled"


def gather(x_ND: Tensor, item_P: Tensor, out_PD: Tensor) -> Tensor:
    """See `rows.gather`."""
    _call("gather", x_ND.contiguous(), item_P, out_PD, *out_PD.shape)
    return out_PD


def combine(rows_PD: Tensor, row_NK: Tensor) -> Tensor:
    """See `rows.combine`."""
    return _combine(rows_PD, row_NK, None, None, None)


def combine_gated(rows_PD: Tensor, row_NK: Tensor, gates_NK: Tensor, experts_NK: Tensor, bias_ED: Tensor) -> Tensor:
    """See `rows.combine_gated`."""
    return _combine(rows_PD, row_NK, *(t.contiguous() for t in (gates_NK, experts_NK, bias_ED)))


def _combine(rows_PD: Tensor, row_NK: Tensor, *gated: Tensor | None) -> Tensor:
    (n, k), d = row_NK.shape, rows_PD.shape[1]
    y_ND = rows_PD.new_empty(n, d)
    _call("combine", rows_PD, row_NK.contiguous(), *gated, y_ND, n, k, d, rows_PD.stride(0))
    return y_ND


def gelu(hidden_PH: Tensor, bias_H: Tensor, approximate: str, act_PH: Tensor) -> Tensor:
    """See `rows.gelu`."""
    _call("bias_gelu", hidden_PH, bias_H, act_PH, *hidden_PH.shape, approximate == "tanh")
    return act_PH


def gelu_backward(
    hidden_PH: Tensor, bias_H: Tensor, approximate: str, grad_PH: Tensor, act_PH: Tensor, grad_bias_H: Tensor
) -> None:
    """See `rows.gelu_backward`."""
    parts = hidden_PH.new_empty(torch.get_num_threads(), 2, hidden_PH.shape[1])
    pointers = hidden_PH, bias_H, grad_PH, act_PH, grad_bias_H, parts
    _call("bias_gelu_backward", *pointers, *hidden_PH.shape, approximate == "tanh")


def gather_gated(
    grad_ND: Tensor,
    item_P: Tensor,
    gate_P: Tensor,
    out_PD: Tensor,
    bias_D: Tensor,
    dout_PD: Tensor,
    dgate_P: Tensor,
    dbias_D: Tensor,
) -> Tensor:
    """See `rows.gather_gated`."""
    parts = out_PD.new_empty(torch.get_num_threads(), 2, out_PD.shape[1])
    pointers = grad_ND.contiguous(), item_P, gate_P, out_PD, bias_D, dout_PD, dgate_P, dbias_D, parts
    _call("gather_gated", *pointers, *out_PD.shape)
    return dout_PD


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """See `dispatch.sort_by_expert`; for experts that `route` chose."""
    order_M, counts_E = experts_NK.new_empty(experts_NK.numel()), experts_NK.new_empty(num_experts)
    _call("sort_by_expert", experts_NK.contiguous(), order_M, counts_E, experts_NK.numel(), num_experts)
    return order_M, counts_E


def route(
    x_ND: Tensor, weight_ED: Tensor, noise_NE: Tensor | None, noise_std: float, top_k: int, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(gates, experts, logits, logits + noise_std noise, sums): see `router.Routing`.

    The sums, if asked for, are (3 E + 1,): importance and load (see `balance`), how often each expert was chosen, and
    the entropies of the softmax without noise."""
    (n, dim), num_experts = x_ND.shape, len(weight_ED)
    logits_NE = x_ND.new_empty(n, num_experts)
    noisy_NE = logits_NE if noise_NE is None else torch.empty_like(logits_NE)
    gates_NK, experts_NK = x_ND.new_empty(n, top_k), x_ND.new_empty(n, top_k, dtype=torch.int64)
    totals = x_ND.new_empty(3 * num_experts + 1) if sums else None
    parts = x_ND.new_empty(_library().route_blocks(n), 3 * num_experts + 1) if sums else None
    given = x_ND.contiguous(), weight_ED.contiguous(), logits_NE, noise_NE, noise_std
    _call("route", *given, noisy_NE, experts_NK, gates_NK, totals, parts, n, dim, num_experts, top_k)
    return gates_NK, experts_NK, logits_NE, noisy_NE, totals


def route_backward(
    x_ND: Tensor,
    weight_ED: Tensor,
    logits_NE: Tensor,
    noisy_NE: Tensor | None,
    noise_std: float,
    experts_NK: Tensor,
    grad_gates_NK: Tensor | None,
    grad_totals: Tensor | None,
    grad_x_ND: Tensor | None,
) -> Tensor:
    """Gradient of `route`'s gates and totals of importance and load with respect to the weight; that with respect to x
    is added to `grad_x_ND`, if that is given. `noisy_NE` is None where there was no noise."""
    n, num_experts = logits_NE.shape
    grad_NE = torch.empty_like(logits_NE)
    grads = (None if grad is None else grad.contiguous() for grad in (grad_gates_NK, grad_totals))
    given = logits_NE, noisy_NE, noise_std, experts_NK, *grads
    _call("route_backward", *given, grad_NE, n, num_experts, experts_NK.shape[1])
    weight_ED, grad_ED = weight_ED.contiguous(), weight_ED.new_empty(weight_ED.shape)
    parts = weight_ED.new_empty(torch.get_num_threads(), 2, weight_ED.numel())
    pointers = x_ND.contiguous(), weight_ED, grad_NE, grad_x_ND, grad_ED, parts
    _call("scores_backward", *pointers, n, num_experts, weight_ED.shape[1])
    return grad_ED


def few_rows(
    x_ND: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, item_P: Tensor, of_expert: list[int], gelu: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """GELU(x w1 + b1) w2 of each row, of_expert[e] rows by expert e: (N, D) -> (P, at least D), of which D count.

    And x w1, (P, at least H), which `few_rows_backward` asks for; without `keep` something else is written there."""
    (num_experts, dim, hidden_dim), p = w1.shape, len(item_P)
    x_PD, hidden_PH, out_PD = (x_ND.new_empty(p, size) for size in (dim, _row_stride(hidden_dim), _row_stride(dim)))
    act_PH = torch.empty_like(hidden_PH) if keep else hidden_PH
    weights = (weight.contiguous() for weight in (w1, b1, w2))
    pointers = x_ND.contiguous(), item_P, _first_rows(item_P, of_expert), *weights, x_PD, hidden_PH, act_PH, out_PD
    _call("few_rows_experts", *pointers, num_experts, dim, hidden_dim, gelu == "tanh")
    return out_PD, hidden_PH


def few_rows_backward(
    x_ND: Tensor,
    grad_ND: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    item_P: Tensor,
    of_expert: list[int],
    gate_P: Tensor,
    hidden_PH: Tensor,
    out_PD: Tensor,
    gelu: str,
    dx_PD: Tensor | None,
    dweights: tuple[Tensor | None, Tensor, Tensor | None, Tensor],
) -> Tensor:
    """Through `y_item += gate_p (out_p + b2 of its expert)` and `few_rows`: the gates' gradient, (P,).

    Writes those of the rows of x into `dx_PD`, shaped as `out_PD` or that itself, and those of w1, b1, w2, b2, where an
    expert has rows, into `dweights`; what is None is left out."""
    num_experts, dim, hidden_dim = w1.shape
    dgate_P, dout_PD = torch.empty_like(gate_P), torch.empty_like(out_PD)
    dhidden_PH, act_PH = torch.empty_like(hidden_PH), torch.empty_like(hidden_PH)
    parts = gate_P.new_empty(torch.get_num_threads(), 2, max(dim, hidden_dim))
    given = x_ND.contiguous(), grad_ND.contiguous(), item_P, _first_rows(item_P, of_expert), gate_P
    weights = (weight.contiguous() for weight in (w1, b1, w2, b2))
    made = dgate_P, dx_PD, *dweights, dout_PD, dhidden_PH, act_PH, parts
    sizes = num_experts, dim, hidden_dim, gelu == "tanh", w1.numel() >= LARGE
    _call("few_rows_experts_backward", *given, *weights, hidden_PH, out_PD, *made, *sizes)
    return dgate_P


def _first_rows(item_P: Tensor, of_expert: list[int]) -> Tensor:
    return item_P.new_tensor([0, *of_expert]).cumsum(0)


def _row_stride(columns: int) -> int:
    return _library().row_stride(columns)


def _call(name: str, *arguments: Tensor | float | None) -> None:
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(_library(), name)(*plain, torch.get_num_threads())


def _library() -> ctypes.CDLL:
    library = _load()
    assert not isinstance(library, str), "the caller asks `serves`"
    return library


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("SPARSE_MLP_C_KERNELS") == "0":
        return "switched off by SPARSE_MLP_C_KERNELS=0"
    if sys.platform != "linux":
        return "compiled on Linux only"
    compiler = _compiler()
    if compiler is None:
        return "no C compiler found (cc, gcc or clang, or what CC names)"
    try:
        library = ctypes.CDLL(str(_compile(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        told = str(getattr(error, "stderr", None) or "").strip() or str(error)
        reason = told.splitlines()[0]
        _log.warning("the experts run without their C kernels, which %s could not compile: %s", compiler, reason)
        return f"{compiler} failed: {reason}"
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes, getattr(library, name).restype = types, None
    library.row_stride.restype = library.route_blocks.restype = _SIZE
    library.row_stride.argtypes = library.route_blocks.argtypes = [_SIZE]
    return library


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def _compile(compiler: str) -> Path:
    """Path of the library for this source, compiler and processor, made if it is not in the cache."""
    cpuinfo = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    processor = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features", "model name"))]
    key = "\n".join([_SOURCE.read_text(), compiler, platform.machine(), *_FLAGS, *processor])
    folder = _folder()
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / path.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
            made.replace(path)  # at once: another process may be making the same
    return path


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or, where that cannot be written, a folder of this process."""
    try:
        kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparse_mlp"
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    except (OSError, RuntimeError):  # read-only, or no home
        pass
    own = Path(tempfile.mkdtemp(prefix="sparse_mlp-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
