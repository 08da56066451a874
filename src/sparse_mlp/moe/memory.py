"""Room for the gradients of all experts: large, and on a CPU new memory at every step, which is dear.

At 64 experts, taking a gradient from the system in pages of 4 KiB costs more time than all matrix products. So it is
taken in huge pages where Linux grants them, and from `KEEP_FROM` bytes on, where glibc would give it back to the system
at every step, it is kept for the next one, as an allocator for a GPU would. In the step that takes it new, what dies
meanwhile can go back to the system (`release`), so that the peak is not the sum of both.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

KEEP_FROM = 2**25
# Python's default would be memory shared with forked processes, in small pages; Windows has no such flags
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_HUGE_PAGE = 2**21
_free: dict[int, list[mmap.mmap]] = {}  # blocks whose tensors are gone, by size


def gradient_like(weight: Tensor) -> tuple[Tensor, bool]:
    """An uninitialised contiguous tensor of the weight's shape, type and device; is its memory new, and to be kept?"""
    plain = weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)
    if plain and weight.nbytes >= KEEP_FROM:
        new = not _free.get(weight.nbytes)
        return torch.frombuffer(_lease(weight.nbytes), dtype=weight.dtype).view(weight.shape), new
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if plain and weight.nbytes >= 2 * _HUGE_PAGE and _MADVISE is not None:
        _MADVISE(*_pages(gradient), mmap.MADV_HUGEPAGE)  # advice: where it fails nothing is lost but the speed
    return gradient, False


def release(tensor: Tensor, to_system: bool) -> None:
    """Free a tensor's memory though others hold the tensor; it is empty from then on.

    `to_system`: its pages too, now. glibc, which keeps freed blocks of up to 32 MB, would hold on to them.
    """
    if to_system and tensor.device.type == "cpu" and _MADVISE is not None and hasattr(mmap, "MADV_DONTNEED"):
        _MADVISE(*_pages(tensor), mmap.MADV_DONTNEED)
    tensor.untyped_storage().resize_(0)


def kept() -> int:
    """Bytes that lie free for the next step."""
    return sum(size * len(blocks) for size, blocks in _free.items())


def give_back() -> None:
    """Return to the system what lies free."""
    _free.clear()


def _lease(size: int) -> ctypes.Array:
    """A block of memory for as long as the result lives; then the block lies free for the next lease of its size."""
    if not _free.get(size):
        give_back()  # the sizes have changed, or more is in use than ever: what lies free may never fit again
        block = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        _free[size] = [block]
    block = _free[size].pop()
    lease = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(lease, _take_back, size, block).atexit = False
    return lease


def _take_back(size: int, block: mmap.mmap) -> None:
    _free.setdefault(size, []).append(block)


def _pages(tensor: Tensor) -> tuple[int, int]:
    """Address and length of the whole pages within a contiguous tensor."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return start, max(0, end - start)


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise


_MADVISE = _find_madvise()
