"""Hire-MLP against the authors' reference outputs, parameter counts and MACs, and against its published form."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp import weights
from sparse_mlp.models.hire_mlp import checkpoint_filter_fn

# parameters, multiply-adds at 224 px, parameters of the dense-prediction backbone: the published code's, counted
PUBLISHED = {
    "hire_mlp_tiny": (18_041_672, 2_144_002_048, 17_529_696),
    "hire_mlp_small": (33_113_848, 4_231_090_176, 32_601_872),
    "hire_mlp_base": (58_226_856, 8_110_620_672, 57_714_880),
    "hire_mlp_large": (95_723_944, 13_421_604_864, 94_956_288),
}
SMALLEST = "hire_mlp_tiny"
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


def test_norms_have_the_published_eps_and_momentum():
    model = timm.create_model("hire_mlp_tiny")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def test_steps_follow_the_published_cycles():
    stages = timm.create_model("hire_mlp_small", device="meta").stages
    assert [[block.attn.step for block in stage.blocks] for stage in stages] == [
        [0, 2, 0], [0, 2, 0, 2], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [0, 1, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (45, 32), (33, 64)], ids=str)
def test_trains_on_one_image_down_to_maps_or_regions_of_one_position(size):
    model = timm.create_model(SMALLEST, num_classes=3).train()
    before = model.norm.running_mean.clone(), model.stages[0].blocks[0].norm1.running_mean.clone()
    model(torch.randn(1, 3, *size)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())
    assert torch.equal(model.norm.running_mean, before[0]) == (
        size == (32, 32)
    )  # a map of one position has no statistics
    assert not torch.equal(model.stages[0].blocks[0].norm1.running_mean, before[1])


def test_batch_norms_survive_conversions_that_go_by_their_type():
    model = timm.create_model(SMALLEST, depths=(1, 1, 1, 1), num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    images = torch.randn(2, 3, 64, 48)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synced.modules())
    with torch.no_grad():
        expected = model(images)
        for converted in (frozen, synced, unfreeze_batch_norm_2d(copy.deepcopy(frozen)).eval()):
            torch.testing.assert_close(converted(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the tracer's own
def test_a_trace_keeps_the_number_of_regions():
    model = timm.create_model(SMALLEST, depths=(1, 1, 1, 1), num_classes=3).eval()
    graph = str(torch.jit.trace(model, torch.randn(1, 3, 96, 96)).inlined_graph)
    assert "aten::neg" not in graph and "aten::floor_divide" in graph
