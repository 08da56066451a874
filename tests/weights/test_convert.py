"""Published checkpoints in every wrapping come out as the weights of our models."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file

from sparse_mlp.weights import CheckpointMismatch, convert, convert_file

NAME = "cycle_mlp_b1"


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7).state_dict()


@pytest.fixture(scope="module")
def published(ours):
    """The weights in the authors' layout, by the inverse of the renaming."""
    out = {}
    for key, value in ours.items():
        head, *rest = key.split(".")
        if head == "stages":
            stage = int(rest[0])
            key = (
                f"network.{2 * stage - 1}.proj.{rest[-1]}"
                if rest[1] == "downsample"
                else ".".join(["network", str(2 * stage), *rest[2:]])
            )
        key = key.replace("stem.", "patch_embed.")
        if ".sfc_" in key and key.endswith("weight"):
            axis = 1 if ".sfc_h" in key else 0
            offset = torch.zeros(value.shape[1], 2)
            offset[:, axis] = (torch.arange(value.shape[1]) + 1) % 3 - 1
            out[key.replace("weight", "offset")] = offset.view(1, -1, 1, 1)
            value = value[:, :, None, None]
        out[key] = value
    return out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"model": sd, "epoch": 299},
        lambda sd: {"state_dict": {f"module.{key}": value for key, value in sd.items()}},
        lambda sd: {
            "state_dict": {f"backbone.{key}": value for key, value in sd.items()} | {"decode_head.w": torch.ones(1)}
        },
        lambda sd: {f"_orig_mod.module.{key}": value for key, value in sd.items()},
    ],
    ids=["bare", "model", "ddp", "segmenter", "compiled ddp"],
)
def test_takes_off_any_wrapping(wrap, ours, published):
    weights = convert(wrap(published), NAME)
    assert weights.keys() == ours.keys()
    assert all(torch.equal(weights[key], ours[key]) for key in ours)


def test_our_own_layout_passes(ours):
    assert all(torch.equal(value, ours[key]) for key, value in convert(ours, NAME).items())


@pytest.mark.parametrize("use_ema", [True, False])
def test_averaged_weights_come_first_unless_asked(use_ema, published):
    ema = {key: value if key.endswith("offset") else value + 1 for key, value in published.items()}
    weights = convert({"model": published, "model_ema": ema}, NAME, use_ema=use_ema)
    assert torch.equal(weights["head.bias"], published["head.bias"] + int(use_ema))


def test_a_dense_backbone_gives_the_weights_of_its_feature_extractor(published):
    dense = {key: value for key, value in published.items() if not key.startswith(("norm", "head"))}
    dense |= {
        f"norm{2 * i}.{leaf}": torch.randn(dim)
        for i, dim in enumerate((64, 128, 320, 512))
        for leaf in ("weight", "bias")
    }
    weights = convert(dense, NAME)
    model = timm.create_model(NAME, features_only=True, output_norms=True)
    model.load_state_dict(weights)
    assert torch.equal(model.model.output_norms[2].bias, dense["norm4.bias"])


def test_weights_of_another_model_are_an_error_with_three_lists(published):
    broken = dict(published, surplus=torch.ones(1))
    broken["patch_embed.proj.bias"] = torch.zeros(3)
    del broken["norm.weight"]
    with pytest.raises(CheckpointMismatch, match=r"matched, 1 missing .*, 1 unexpected .surplus") as caught:
        convert(broken, NAME)
    assert caught.value.missing == ["norm.weight"] and caught.value.unexpected == ["surplus"]
    assert caught.value.misshapen == ["stem.proj.bias"] and "stem.proj.bias (3,) for (64,)" in str(caught.value)
    assert len(caught.value.matched) == len(convert(published, NAME)) - 2


def test_load_state_dict_is_torchs_own(published):
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        timm.create_model(NAME, num_classes=7).load_state_dict(published)


def test_a_misspelt_model_is_told_the_nearest():
    with pytest.raises(ValueError, match="cycle_mlp_b1"):
        convert({}, "cycle_mpl_b1")


def test_files(tmp_path, published, ours):
    source, target = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    torch.save({"model": published}, source)
    assert convert_file(source, NAME, target) == len(ours)
    assert all(torch.equal(value, ours[key]) for key, value in load_file(target).items())
    with pytest.raises(ValueError, match=r"\.safetensors"):
        convert_file(source, NAME, tmp_path / "ours.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_file(tmp_path / "nowhere.pth", NAME, target)


def test_a_target_in_no_folder(tmp_path):
    source = tmp_path / "weights.pth"
    torch.save({}, source)
    with pytest.raises(FileNotFoundError, match=r"there is no folder \S+/nowhere to write out.safetensors into"):
        convert_file(source, "cycle_mlp_b1", tmp_path / "nowhere" / "out.safetensors")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, published):
    torch.save({"model": published, "config": pytest.approx(1)}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match="without running code"):
        convert_file(tmp_path / "unsafe.pth", NAME, tmp_path / "out.safetensors")
