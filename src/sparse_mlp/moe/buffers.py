"""Buffers that no checkpoint holds, on a module that is built on the meta device and gets its memory later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NonPersistentBuffers(nn.Module):
    """Calls `init_non_persistent_buffers` when the module has left the meta device: by `to_empty`, which leaves what
    the memory held, or because weights were assigned to it, when the buffers follow them to their device."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_follow_weights)

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers as at the start. timm's name: it calls this on models built on the meta device."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        was_meta = any(buffer.is_meta for buffer in self.buffers())
        super()._apply(fn, recurse)
        if was_meta and not any(buffer.is_meta for buffer in self.buffers()):
            self.init_non_persistent_buffers()
        return self


def _follow_weights(module: NonPersistentBuffers, _: Any) -> None:
    weight = next(module.parameters())
    if weight.is_meta or not any(buffer.is_meta for buffer in module.buffers()):
        return
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:  # one that the checkpoint holds
                continue
            setattr(owner, name, torch.empty_like(buffer, device=weight.device))
    module.init_non_persistent_buffers()
