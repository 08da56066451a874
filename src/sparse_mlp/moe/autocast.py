"""torch's autocast, asked of a tensor's device."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type products on the device of `x` run in by autocast; None where it is off or unknown there (meta)."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
