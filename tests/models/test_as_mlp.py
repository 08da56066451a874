"""AS-MLP against the authors' reference outputs, parameter counts and MACs, and against its published form."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp import weights
from sparse_mlp.models.as_mlp import checkpoint_filter_fn

# parameters, multiply-adds at 224 px, parameters of the dense-prediction backbone: the published code's, counted
PUBLISHED = {
    "as_mlp_tiny": (28_282_696, 4_350_425_088, 27_515_040),
    "as_mlp_small": (49_594_696, 8_512_200_000, None),
    "as_mlp_base": (87_752_808, 15_126_100_000, None),
}
SMALLEST = "as_mlp_tiny"
STAGES = {f"layers.{i}.blocks.{depth - 1}": i for i, depth in enumerate((2, 2, 6, 2))}
SIZES = [(225, 299), (250, 186), (32, 32), (33, 70)]


def test_equals_the_reference_outputs(reference, assert_golden):
    _, state_dict = reference.weights(SMALLEST)
    golden = reference.golden(SMALLEST)
    assert {key: list(value.shape) for key, value in state_dict.items()} == dict(golden["state_dict"])
    model = timm.create_model(SMALLEST)
    model.load_state_dict(checkpoint_filter_fn(state_dict))
    assert_golden(model, SMALLEST, STAGES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name):
    params, macs, dense_params = PUBLISHED[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == pytest.approx(2 * macs, rel=1e-5, abs=0)
    if dense_params:
        dense = timm.create_model(name, device="meta", features_only=True, output_norms=True)
        assert sum(p.numel() for p in dense.parameters()) == dense_params


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_published_form_at_any_size(reference, size):
    published, state_dict = reference.weights(SMALLEST)
    model = timm.create_model(SMALLEST).eval()
    model.load_state_dict(checkpoint_filter_fn(state_dict))
    images = reference.images(1, *size)
    with torch.inference_mode():
        expected, logits = published(images), model(images)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(64, 96), (250, 186)], ids=str)
def test_output_norms_give_the_published_dense_maps(reference, size, tmp_path):
    published, state_dict = reference.weights(SMALLEST, dense=True)
    torch.save(
        {"state_dict": {f"module.backbone.{key}": value for key, value in state_dict.items()}}, tmp_path / "dense.pth"
    )
    model = timm.create_model(SMALLEST, features_only=True, output_norms=True)
    weights.load(model, tmp_path / "dense.pth")
    images = reference.images(1, *size)
    with torch.inference_mode():
        expected, maps = published(images), model.eval()(images)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_ema"])
def test_the_authors_files_load(reference, wrapper, tmp_path):
    published, state_dict = reference.weights(SMALLEST)
    stored = {f"module.{key}": value for key, value in state_dict.items()}
    torch.save({wrapper: stored, "epoch": 3} if wrapper else stored, tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    model = timm.create_model(SMALLEST, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    images = reference.images(1, 64, 64)
    with torch.inference_mode():
        expected, logits = published(images), model(images)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_training_gradients_equal_the_published_forms(reference):
    published, state_dict = reference.weights(SMALLEST)
    model = timm.create_model(SMALLEST)
    model.load_state_dict(checkpoint_filter_fn(state_dict))
    images = reference.images(2, 64, 64).double()
    for network in (published.double(), model.double()):
        network.eval()(images).square().mean().backward()
    theirs = checkpoint_filter_fn({key: p.grad for key, p in published.named_parameters()})
    for key, parameter in model.named_parameters():
        assert (parameter.grad - theirs[key]).abs().max() <= 1e-9 * theirs[key].abs().max(), key


def test_statistics_are_those_of_the_whole_image_with_the_published_eps():
    norm = timm.create_model("as_mlp_tiny").norm
    assert norm.num_groups == 1 and norm.eps == 1e-5
    x = torch.randn(2, 768, 3, 4) * 3 + 1
    y = norm(x)
    torch.testing.assert_close(
        y, (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    )


def test_merging_takes_rows_fastest():
    merging = timm.create_model("as_mlp_tiny").stages[1].downsample
    x = torch.randn(1, 5, 6, 96)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    corners = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    normed = merging.norm(torch.cat(corners, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(merging(x), merging.reduction(normed))
