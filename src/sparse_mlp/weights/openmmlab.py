"""The names of mmsegmentation's checkpoints, in which the published dense models were stored.

Its UPerNet, Semantic FPN (neck and head) and auxiliary FCN head are the same functions as ours, layer by layer. Its
detectors are not torchvision's: boxes are pooled with aligned corners there, anchors are centred differently, and the
background is the last class, so that their heads are refused rather than read; a detector's backbone is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from sparse_mlp.errors import UserError

__all__ = ["head_from_mmseg"]

_RULES = (
    (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"head.pools.\1.1."),
    (r"^decode_head\.bottleneck\.", "head.bottleneck."),
    (r"^decode_head\.lateral_convs\.(\d+)\.", r"head.laterals.\1."),
    (r"^decode_head\.fpn_convs\.(\d+)\.", r"head.smooths.\1."),
    (r"^decode_head\.fpn_bottleneck\.", "head.fuse."),
    (r"^decode_head\.scale_heads\.(\d+)\.(\d+)\.", r"head.scales.\1.\2."),
    (r"^decode_head\.conv_seg\.", "head.classify."),
    (r"^neck\.lateral_convs\.(\d+)\.", r"head.pyramid.inner_blocks.\1."),
    (r"^neck\.fpn_convs\.(\d+)\.", r"head.pyramid.layer_blocks.\1."),
    (r"^auxiliary_head\.convs\.0\.", "auxiliary.conv."),
    (r"^auxiliary_head\.conv_seg\.", "auxiliary.classify."),
)
_DETECTORS = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")


def head_from_mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of neck and heads under our names; the backbone's are left out.

    UserError for the heads of a detector, and for a head that is neither UPerNet nor Semantic FPN.
    """
    detector = next((name for name in state if name.startswith(_DETECTORS)), None)
    if detector is not None:
        raise UserError(
            f"{detector} belongs to a detector of mmdetection, whose heads are other functions than torchvision's: "
            "only its backbone can be read, with the backbone's name as --model"
        )
    found = {}
    for name, value in state.items():
        if name.startswith("backbone."):
            continue
        rule = next(((pattern, ours) for pattern, ours in _RULES if re.match(pattern, name)), None)
        if rule is None:
            raise UserError(f"{name} belongs to no head that is read: UPerNet, Semantic FPN and an FCN head are")
        renamed = re.sub(*rule, name)
        # A layer of convolution, norm and activation is (conv, bn) there and (0, 1) here.
        found[re.sub(r"\.bn\.", ".1.", re.sub(r"\.conv\.(?=weight|bias)", ".0.", renamed))] = value
    return found
