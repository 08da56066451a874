"""The layout of MoCo v3's published checkpoints: encoder, projector, predictor and momentum copy in one state dict.

Source: github.com/facebookresearch/moco-v3, `moco/builder.py` and how its `main_lincls.py` reads them. The projector
stands where the backbone's classifier was: `head` of a vision transformer or MLP, `fc` of a ResNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_mlp.errors import UserError

_ENCODER, _MOMENTUM = "base_encoder.", "momentum_encoder."
_PROJECTORS = ("head.", "fc.")


def from_moco(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The bare backbone of a MoCo v3 checkpoint, without a classifier; any other state dict as it is.

    Taken is the encoder that was trained by gradient, as the authors' own probe does, not its momentum copy.

    Args:
        state_dict: names and tensors, the wrappers `state_dict` and `module.` already taken off (timm does).
    """
    if not any(name.startswith((_ENCODER, _MOMENTUM)) for name in state_dict):
        return dict(state_dict)
    encoder = {name.removeprefix(_ENCODER): value for name, value in state_dict.items() if name.startswith(_ENCODER)}
    if not encoder:
        raise UserError(f"a MoCo v3 checkpoint without {_ENCODER}*: it has no encoder that was trained")
    return {name: value for name, value in encoder.items() if not name.startswith(_PROJECTORS)}
