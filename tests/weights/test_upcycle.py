"""Experts in timm's models and ours: which MLPs, what they begin as, what is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import sparse_mlp
from sparse_mlp.errors import UserError
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.telemetry import moe_layers
from sparse_mlp.weights import load

SHALLOW = {"depths": (1, 1, 2, 1)}
FAMILIES: dict[str, tuple[str, dict, int]] = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}, 32),
    "CLIP's quick GELU": ("vit_base_patch32_clip_quickgelu_224", {"img_size": 32, "depth": 2, "embed_dim": 96}, 32),
    "SigLIP": ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 2, "embed_dim": 96}, 32),
    "DeiT III": ("deit3_small_patch16_224", {"img_size": 32, "depth": 3}, 32),
    "BEiT": ("beit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 96}, 32),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, 28),
    "EVA-02 with a norm": ("eva02_base_patch14_224", {"img_size": 28, "depth": 2, "embed_dim": 96}, 28),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}, 28),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", {"img_size": 28, "depth": 2, "embed_dim": 96, "num_heads": 2}, 28),
    "DINOv3 plus": ("vit_small_plus_patch16_dinov3", {"img_size": 32, "depth": 2}, 32),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, **SHALLOW}, 64),
    "Swin v2": ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 2, **SHALLOW}, 64),
    "ConvNeXt": ("convnext_tiny", SHALLOW, 64),
    "ConvNeXt of convolutions": ("convnext_atto", SHALLOW, 64),
    "PoolFormer": ("poolformer_s12", {}, 64),
    "PoolFormer v2": ("poolformerv2_s12", {}, 64),
    "CAFormer": ("caformer_s18", {}, 64),
    "MaxViT": ("maxvit_tiny_tf_224", {"img_size": 64}, 64),
    "CoAtNet": ("coatnet_nano_rw_224", {"img_size": 64}, 64),
    "Mixer": ("mixer_s32_224", {"img_size": 64}, 64),
    "gMixer": ("gmixer_12_224", {"img_size": 64}, 64),
    "ResMLP": ("resmlp_12_224", {"img_size": 64}, 64),
    "CoaT": ("coat_tiny", {"img_size": 64}, 64),
    "AS-MLP": ("as_mlp_tiny", SHALLOW, 64),
    "CycleMLP": ("cycle_mlp_b1", SHALLOW, 64),
    "Hire-MLP": ("hire_mlp_tiny", SHALLOW, 64),
    "Sparse-MLP's dense blocks": ("sparse_mlp_t4_32", {"sparse_blocks": 0}, 32),
}


def build(family: str) -> tuple[nn.Module, torch.Tensor]:
    name, arguments, size = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).eval()
    for module in model.modules():  # scales of 1e-6 would hide what the MLPs answer
        for name in ("gamma", "gamma_1", "gamma_2"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.ones_(getattr(module, name))
    return model, torch.randn(2, 3, size, size)


def vit(**arguments) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6, num_classes=4, **arguments).eval()


IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_stay_what_they_were_for_every_k(family: str) -> None:
    dense, images = build(family)
    expected = dense(images)
    for top_k in (1, 2, 4):
        model = copy.deepcopy(dense)
        assert sparse_mlp.sparsify(model, 2, num_experts=4, top_k=top_k) is model
        assert len(moe_layers(model)) >= 2
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_it_trains_and_the_experts_part() -> None:
    model = sparse_mlp.sparsify(vit(), 2, num_experts=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    for layer in moe_layers(model).values():
        weight = layer.experts.fc1.weight
        assert all(not torch.equal(weight[0], weight[e]) for e in range(1, 4))
        assert layer.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (2, ["blocks.4.mlp", "blocks.5.mlp"]),
        ([0, -1], ["blocks.0.mlp", "blocks.5.mlp"]),
        ("last-2", ["blocks.3.mlp", "blocks.5.mlp"]),
        ("every-2", ["blocks.1.mlp", "blocks.3.mlp", "blocks.5.mlp"]),
        ("blocks.2", ["blocks.2.mlp"]),
        (["blocks.2.mlp", "blocks.4"], ["blocks.2.mlp", "blocks.4.mlp"]),
    ],
)
def test_blocks(blocks, expected: list[str]) -> None:
    assert list(moe_layers(sparse_mlp.sparsify(vit(), blocks, num_experts=2))) == expected


def test_last_of_a_model_in_stages_are_the_last_blocks_of_its_stages() -> None:
    model = sparse_mlp.sparsify(timm.create_model("cycle_mlp_b1"), "last-2", num_experts=2)
    assert list(moe_layers(model)) == ["stages.2.blocks.3.mlp", "stages.3.blocks.1.mlp"]


def test_a_feature_extractor_has_them_in_the_same_places() -> None:
    model = timm.create_model("cycle_mlp_b1", features_only=True).eval()
    expected = model(IMAGES[:1])
    sparse_mlp.sparsify(model, ["stages.3.blocks.1", "stages.1.blocks.0"], num_experts=2)
    assert len(moe_layers(model)) == 2
    torch.testing.assert_close(model(IMAGES[:1]), expected, rtol=1e-5, atol=1e-5)


def test_one_kind_of_mlp_by_name() -> None:
    model = timm.create_model("mixer_t4_32")
    sparse_mlp.sparsify(model, ["blocks.1.mlp_channels"], num_experts=2)
    assert list(moe_layers(model)) == ["blocks.1.mlp_channels"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {}, "ResNet has no MLPs that experts can stand for"),
        ("gmlp_s16_224", {}, r"blocks\.0\.mlp_channels: the gate of a GatedMlp mixes positions"),
        ("convnextv2_atto", {}, "GlobalResponseNorm is taken over all positions"),
        ("pvt_v2_b0", {}, "MlpWithDepthwiseConv is no MLP"),
        ("efficientformer_l1", {"blocks": [0]}, r"stages\.0\.blocks\.0\.mlp cannot have experts: a ConvMlpWithNorm"),
        ("vit_tiny_patch16_224", {"blocks": 13}, "blocks 13 does not fit a model of 12 blocks"),
        ("vit_tiny_patch16_224", {"blocks": [12]}, "there is no block 12: the model has 12, 0 to 11"),
        ("vit_tiny_patch16_224", {"blocks": []}, "blocks is empty"),
        ("vit_tiny_patch16_224", {"blocks": "block.3"}, r"no block 'block\.3'; nearest: blocks\.3"),
        ("vit_tiny_patch16_224", {"blocks": "last-7"}, 'blocks "last-7" does not fit'),
        ("vit_tiny_patch16_224", {"blocks": "every-0"}, 'blocks "every-0" does not fit'),
        ("vit_tiny_patch16_224", {"top_k": 9}, r"top_k must be at most num_experts \(8\); got 9"),
        ("vit_tiny_patch16_224", {"num_experts": 0}, "num_experts must be at least 1"),
        ("vit_tiny_patch16_224", {"init": "copies"}, "init must be one of copy, noise, drop, sample, random"),
        ("vit_tiny_patch16_224", {"router": "centroids"}, "needs images"),
        ("vit_tiny_patch16_224", {"strength": 0.1}, "strength 0.1 has no effect on 'copy'"),
        ("vit_tiny_patch16_224", {"init": "drop", "strength": 2.0}, r"strength 2 is not in \(0, 1\]"),
        ("vit_tiny_patch16_224", {"images": IMAGES}, "images would be ignored"),
        ("sparse_mlp_t4_32", {"blocks": 1}, r"blocks\.5\.mlp_tokens has 8 experts already"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(name: str, arguments: dict, message: str) -> None:
    model = timm.create_model(name, device="meta")
    before = list(model.state_dict())
    with pytest.raises(UserError, match=message) as error:
        sparse_mlp.sparsify(model, **arguments)
    assert "\n" not in str(error.value)
    assert list(model.state_dict()) == before


def test_frozen_mlps_make_frozen_experts_and_a_router_that_learns() -> None:
    model = vit().requires_grad_(False)
    sparse_mlp.sparsify(model, 1, num_experts=2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["blocks.5.mlp.router.weight"]


def test_further_arguments_are_the_layers() -> None:
    model = sparse_mlp.sparsify(vit(), 1, 4, 2, shared_experts=1, eval_capacity_ratio=1.0, renormalize=False)
    layer = model.blocks[5].mlp
    assert (layer.shared_experts, layer.eval_capacity_ratio, layer.router.renormalize) == (1, 1.0, False)


# ---- Starts ----


def experts_of(**arguments) -> tuple[nn.Module, MoeMlp, nn.Module]:
    """The dense MLP, the layer, and the model."""
    model = vit()
    mlp = copy.deepcopy(model.blocks[5].mlp)
    sparse_mlp.sparsify(model, 1, num_experts=4, **arguments)
    return mlp, model.blocks[5].mlp, model


def test_noise_is_in_proportion_to_each_weight() -> None:
    mlp, layer, _ = experts_of(init="noise", strength=0.1)
    for linear, dense in ((layer.experts.fc1, mlp.fc1), (layer.experts.fc2, mlp.fc2)):
        noise = linear.weight - dense.weight.t()
        assert noise.std().item() == pytest.approx(0.1 * dense.weight.std().item(), rel=0.05)
        assert not torch.equal(linear.weight[0], linear.weight[1])
        assert torch.equal(linear.bias, dense.bias.expand(4, -1))


@pytest.mark.parametrize("gated", [False, True])
def test_drop_draws_the_same_neurons_of_every_matrix_anew(gated: bool) -> None:
    if gated:
        model, _ = build("EVA-02")
        mlp = copy.deepcopy(model.blocks[1].mlp)
        layer = sparse_mlp.sparsify(model, 1, num_experts=4, init="drop", strength=0.25).blocks[1].mlp
    else:
        mlp, layer, _ = experts_of(init="drop", strength=0.25)
    hidden_dim = layer.experts.fc2.weight.shape[1]
    fc1 = (layer.experts.fc1.weight != mlp.fc1.weight.t()).unflatten(2, (-1, hidden_dim))
    changed = (layer.experts.fc2.weight != mlp.fc2.weight.t()).all(2)  # (E, H)
    assert changed.sum(1).tolist() == [round(0.25 * hidden_dim)] * 4
    assert torch.equal(fc1.all(1), changed.unsqueeze(1).expand(-1, fc1.shape[2], -1))
    assert not torch.equal(changed[0], changed[1])
    drawn, dense = layer.experts.fc2.weight[0][changed[0]], mlp.fc2.weight.t()[changed[0]]
    assert drawn.std().item() == pytest.approx(dense.std().item(), rel=0.1)


def test_sample_takes_a_share_of_the_neurons() -> None:
    mlp, layer, model = experts_of(init="sample", strength=0.25)
    assert layer.experts.fc1.weight.shape == (4, 192, 192)
    dense = torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None], mlp.fc2.weight.t()], 1)
    for e in range(4):
        fc1, fc2 = layer.experts.fc1, layer.experts.fc2
        own = torch.cat([fc1.weight[e].t(), fc1.bias[e][:, None], fc2.weight[e]], 1)
        same = (own[:, None] == dense[None]).all(2)
        assert same.sum(1).tolist() == [1] * 192 and same.sum(0).max() == 1
    assert model(IMAGES).isfinite().all()


def test_sample_prefers_neurons_that_are_active_on_the_images() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[5].mlp.fc1.weight[:100] = 0.0
        model.blocks[5].mlp.fc1.bias[:100] = -20.0  # GELU of it is zero
    layer = sparse_mlp.sparsify(model, 1, num_experts=4, init="sample", strength=0.25, images=IMAGES).blocks[5].mlp
    assert layer.experts.fc1.bias.min() > -20.0


def test_random_experts_differ() -> None:
    mlp, layer, _ = experts_of(init="random")
    assert not torch.equal(layer.experts.fc1.weight[0], layer.experts.fc1.weight[1])
    assert not torch.equal(layer.experts.fc1.weight[0], mlp.fc1.weight.t())


@pytest.mark.parametrize("family", ["ViT", "ConvNeXt of convolutions"])
def test_centroids_send_each_cluster_to_an_expert_of_its_own(family: str) -> None:
    dense, images = build(family)
    expected = dense(images)
    model = sparse_mlp.sparsify(dense, 1, num_experts=4, router="centroids", images=images)
    (layer,) = moe_layers(model).values()
    torch.testing.assert_close(layer.router.weight.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)  # and the experts are copies
    assert not model.training
    model.train()(images)
    assert (layer.meter.load > 0).all()


def test_too_few_items_for_the_centroids() -> None:
    with pytest.raises(UserError, match="6 centroids need as many items; the images give 5"):
        sparse_mlp.sparsify(vit(), 1, num_experts=6, router="centroids", images=IMAGES[:1])


# ---- Weights of a dense model and of one with experts ----


def test_dense_weights_do_not_fit_experts_nor_these_the_dense_model_and_the_error_says_what_to_do(tmp_path) -> None:
    dense, sparse = vit(), sparse_mlp.sparsify(vit(), 1, num_experts=2)
    for model, name in ((dense, "dense.pth"), (sparse, "sparse.pth")):
        torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(UserError, match=r"a dense model's: load them before `sparse_mlp\.sparsify`") as error:
        load(sparse, tmp_path / "dense.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"of a model with experts: call `sparse_mlp\.sparsify`"):
        load(dense, tmp_path / "sparse.pth")
    load(sparse, tmp_path / "sparse.pth")
