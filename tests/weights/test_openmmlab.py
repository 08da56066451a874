"""Segmenters of mmsegmentation's are read under its names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_mlp.cli.main import main
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import override
from sparse_mlp.jobs.segment import SegmentJob, SegmentRecipe, convert_mmseg
from sparse_mlp.recipes import get

# The names that mmsegmentation's modules have, written down from its configuration files for these heads.
UPERNET = [
    "decode_head.conv_seg.weight",
    "decode_head.conv_seg.bias",
    "decode_head.psp_modules.0.1.conv.weight",
    "decode_head.psp_modules.0.1.bn.weight",
    "decode_head.psp_modules.0.1.bn.bias",
    "decode_head.psp_modules.3.1.bn.running_mean",
    "decode_head.psp_modules.3.1.bn.running_var",
    "decode_head.bottleneck.conv.weight",
    "decode_head.bottleneck.bn.weight",
    "decode_head.lateral_convs.2.conv.weight",
    "decode_head.lateral_convs.2.bn.bias",
    "decode_head.fpn_convs.0.conv.weight",
    "decode_head.fpn_convs.2.bn.num_batches_tracked",
    "decode_head.fpn_bottleneck.conv.weight",
    "decode_head.fpn_bottleneck.bn.running_var",
    "auxiliary_head.convs.0.conv.weight",
    "auxiliary_head.convs.0.bn.weight",
    "auxiliary_head.conv_seg.weight",
    "auxiliary_head.conv_seg.bias",
    "backbone.patch_embed.proj.weight",
    "backbone.layers.1.blocks.0.axial_shift.conv2_1.weight",
    "backbone.norm3.weight",
]
FPN = [
    "neck.lateral_convs.0.conv.weight",
    "neck.lateral_convs.3.conv.bias",
    "neck.fpn_convs.1.conv.weight",
    "decode_head.scale_heads.0.0.conv.weight",
    "decode_head.scale_heads.3.4.bn.running_mean",
    "decode_head.conv_seg.bias",
    "backbone.patch_embed.proj.weight",
    "backbone.network.0.1.attn.mlp_h1.weight",
    "backbone.norm6.running_var",
]
TO_MMSEG = (  # the other direction, by hand
    (r"^head\.pools\.(\d)\.1\.", r"decode_head.psp_modules.\1.1."),
    (r"^head\.pyramid\.inner_blocks\.", "neck.lateral_convs."),
    (r"^head\.pyramid\.layer_blocks\.", "neck.fpn_convs."),
    (r"^head\.laterals\.", "decode_head.lateral_convs."),
    (r"^head\.smooths\.", "decode_head.fpn_convs."),
    (r"^head\.scales\.", "decode_head.scale_heads."),
    (r"^head\.fuse\.", "decode_head.fpn_bottleneck."),
    (r"^head\.bottleneck\.", "decode_head.bottleneck."),
    (r"^(head|auxiliary)\.classify\.", r"\1.conv_seg."),
    (r"^auxiliary\.conv\.", "auxiliary_head.convs.0."),
    (r"^head\.conv_seg", "decode_head.conv_seg"),
    (r"^auxiliary\.conv_seg", "auxiliary_head.conv_seg"),
    (r"^maps\.getter\.model\.", "backbone."),
)
LAYERS = (r"\.0\.(weight|bias)$", r".conv.\1"), (r"\.1\.(\w+)$", r".bn.\1")


def to_mmseg(name: str) -> str:
    for pattern, theirs in TO_MMSEG:
        name = re.sub(pattern, theirs, name)
    if not name.startswith("backbone."):
        for pattern, theirs in LAYERS:
            name = re.sub(pattern, theirs, name)
    return name


@pytest.mark.parametrize(
    ("recipe", "names"), [("ade20k_as_mlp_tiny_upernet", UPERNET), ("ade20k_hire_mlp_small_fpn", FPN)]
)
def test_heads_have_mmsegmentations_names(recipe, names):
    with torch.device("meta"):
        model = SegmentJob.build(get(recipe), ("",) * 150)
    theirs = {to_mmseg(name) for name in model.state_dict() if not name.startswith("maps.")}
    assert [name for name in names if not name.startswith("backbone.") and name not in theirs] == []


def tiny() -> SegmentRecipe:
    changes = {
        "model": {"name": "as_mlp_tiny", "args": {"depths": [1, 1, 1, 1], "embed_dim": 8}},
        "head": {"width": 8},
    }
    return override(get("ade20k_as_mlp_tiny_upernet"), changes)


def test_a_segmenter_comes_back_as_it_was(tmp_path: Path):
    torch.manual_seed(0)
    model = SegmentJob.build(tiny(), ("",) * 6).eval()
    stored = {to_mmseg(name): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": stored, "meta": {"epoch": 1}}, tmp_path / "theirs.pth")
    count = convert_mmseg(tmp_path / "theirs.pth", tiny(), tmp_path / "ours.safetensors")
    found = load_file(tmp_path / "ours.safetensors")
    assert count == len(found) == len(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name


def test_what_is_another_function_is_said(tmp_path: Path, capsys):
    states = {
        "detector": {"backbone.x": torch.zeros(1), "rpn_head.rpn_conv.weight": torch.zeros(1)},
        "other": {"decode_head.conv_cfg.weight": torch.zeros(1)},
    }
    for name, message in (("detector", "rpn_head.rpn_conv.weight belongs to a detector"), ("other", "no head that is")):
        torch.save(states[name], tmp_path / f"{name}.pth")
        command = ["convert", str(tmp_path / f"{name}.pth"), str(tmp_path / "o.safetensors")]
        assert main([*command, "--model", "ade20k_as_mlp_tiny_upernet"]) == 2
        assert message in capsys.readouterr().err
    torch.save({"backbone.x": torch.zeros(1)}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"has no decode_head\.conv_seg"):
        convert_mmseg(tmp_path / "none.pth", tiny(), tmp_path / "o.safetensors")
