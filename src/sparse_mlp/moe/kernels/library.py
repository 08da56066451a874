"""The library of C kernels: compiled from cpu.c when first needed, for the processor it then runs on.

That takes half a second, once: the library is kept in the user's cache, with its digest at its end, and built again if
the file is damaged. Where there is no compiler, torch does the work.
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
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
# `-x c`: a C++ compiler would mangle the names
FLAGS = ("-x", "c", "-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
# the members of each function's struct: pointers, then sizes, then the number of threads
POINTERS = {
    "column_sums": "rows total parts",
    "gather": "x item out",
    "combine": "rows row gate y",
    "combine_backward": "grad rows row gate grad_rows grad_gate written",
    "sort_by_expert": "expert item row count",
    "top_gates": "logits chosen gates",
    "top_gates_backward": "logits chosen grad_gates grad_logits",
    "expert_totals": "logits noisy chosen totals parts",
    "expert_totals_backward": "logits noisy chosen grad_totals grad_logits grad_noisy",
    "bias_gelu": "hidden bias act",
    "bias_gelu_backward": "hidden bias grad act grad_bias parts",
    "few_rows_experts": "x first_row w1 b1 w2 b2 hidden act out",
    "few_rows_experts_backward": (
        "x first_row w1 b1 w2 hidden grad grad_x grad_w1 grad_b1 grad_w2 grad_b2 grad_rows grad_hidden act parts"
    ),
}
NUMBERS = {
    "column_sums": "n d",
    "gather": "n m d",
    "combine": "n k m d stride",
    "combine_backward": "n k m d stride",
    "sort_by_expert": "m k experts",
    "top_gates": "n experts k",
    "top_gates_backward": "n experts k",
    "expert_totals": "n experts k",
    "expert_totals_backward": "n experts k",
    "bias_gelu": "n d by_tanh",
    "bias_gelu_backward": "n d by_tanh",
    "few_rows_experts": "experts d h by_tanh",
    "few_rows_experts_backward": "experts d h by_tanh large",
}
SIZES = ("row_stride", "blocks_of")


@cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.platform != "linux":
        return "compiled on Linux only"
    compiler = find_compiler()
    if compiler is None:
        return "no C compiler found (cc, gcc or clang, or what CC names)"
    try:
        library = ctypes.CDLL(str(_build(compiler)))
        for name in POINTERS:
            getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_void_p], None
        for name in SIZES:
            getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_int64], ctypes.c_int64
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        message = str(getattr(error, "stderr", None) or "").strip() or str(error)
        reason = message.splitlines()[0]
        _log.warning("the experts run without their C kernels, which %s could not compile: %s", compiler, reason)
        return f"{compiler} failed: {reason}"
    return library


@cache
def _struct(name: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, ctypes.c_void_p) for field in POINTERS[name].split()]
    fields += [(field, ctypes.c_int64) for field in (*NUMBERS[name].split(), "threads")]
    if name.startswith("expert_totals"):
        fields.append(("noise_std", ctypes.c_double))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def call(name: str, tensors: tuple[Tensor | None, ...], *sizes: int, noise_std: float | None = None) -> None:
    """Run a C function; the tensors are in the order of its struct, contiguous, and alive until it returns."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    values = [*pointers, *sizes, torch.get_num_threads(), *([] if noise_std is None else [noise_std])]
    getattr(load(), name)(ctypes.byref(_struct(name)(*values)))


def size(name: str, value: int) -> int:
    """What a function of one size says, as `row_stride`."""
    return getattr(load(), name)(value)


def find_compiler() -> str | None:
    """Path of the C compiler: what CC names, cc, gcc or clang."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def _build(compiler: str) -> Path:
    """Path of the library for this source, compiler and processor, compiled if it is not in the cache."""
    cpuinfo = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    processor = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features", "model name"))]
    key = "\n".join([SOURCE.read_text(), compiler, platform.machine(), *FLAGS, *processor])
    folder = _folder()
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not _is_whole(path):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            built = Path(own) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
            content = built.read_bytes()
            built.write_bytes(content + hashlib.sha256(content).digest())  # loaders ignore what follows the sections
            built.replace(path)  # atomic: another process may be building the same
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is there and ends with the digest of the rest."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


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
