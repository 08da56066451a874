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

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
# `-x c`: a C++ compiler would mangle the names
FLAGS = ("-x", "c", "-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
FUNCTIONS = (
    "column_sums",
    "gather",
    "combine",
    "combine_backward",
    "sort_by_expert",
    "top_gates",
    "top_gates_backward",
    "expert_totals",
    "expert_totals_backward",
    "bias_gelu",
    "bias_gelu_backward",
    "few_rows_experts",
    "few_rows_experts_backward",
)
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
        for name in FUNCTIONS:
            getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_void_p], None
        for name in SIZES:
            getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_int64], ctypes.c_int64
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        message = str(getattr(error, "stderr", None) or "").strip() or str(error)
        reason = message.splitlines()[0]
        _log.warning("the experts run without their C kernels, which %s could not compile: %s", compiler, reason)
        return f"{compiler} failed: {reason}"
    return library


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
