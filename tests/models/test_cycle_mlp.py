"""CycleMLP against the authors' reference outputs, parameter counts and MACs, and against its published form."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp import weights
from sparse_mlp.models.cycle_mlp import checkpoint_filter_fn

# parameters, multiply-adds at 224 px, parameters of the dense-prediction backbone: the published code's, counted
PUBLISHED = {
    "cycle_mlp_b1": (15_155_400, 2_121_523_200, 14_643_424),
    "cycle_mlp_b2": (26_802_504, 3_875_766_272, 26_290_528),
    "cycle_mlp_b3": (38_385_720, 6_830_968_832, 37_873_744),
    "cycle_mlp_b4": (51_796_552, 10_027_163_648, 51_284_576),
    "cycle_mlp_b5": (75_747_280, 12_232_436_736, 74_979_624),
}
SMALLEST = "cycle_mlp_b1"
STAGES = {f"network.{2 * i}": i for i in range(4)}
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
    assert counter.get_total_flops() == pytest.approx(2 * macs, rel=0, abs=0)
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


def test_norms_have_the_published_eps():
    # 1e-6 would change the logits by 2e-6 of the largest only, which no output comparison sees
    model = timm.create_model("cycle_mlp_b1")
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}


def test_a_checkpoint_with_other_offsets_is_refused(reference):
    state_dict = reference.published.build("cycle_mlp_b1").state_dict()
    state_dict["network.0.0.attn.sfc_h.offset"].mul_(-1)
    with pytest.raises(ValueError, match=r"network\.0\.0\.attn\.sfc_h\.offset"):
        checkpoint_filter_fn(state_dict)
