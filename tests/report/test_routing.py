"""Which expert patches and channels went to, against plain loops and against what the layers record."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from sparse_mlp.moe import telemetry
from sparse_mlp.moe.telemetry import RoutingRecord
from sparse_mlp.report import routing


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("sparse_mlp_t4_32", num_classes=3, in_chans=1, img_size=8, patch_size=2, **kwargs).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_dense_gates_put_each_choice_in_its_place_and_leave_drops_out() -> None:
    record = RoutingRecord(
        experts=torch.tensor([[[0, 2], [1, 0]]]),
        gates=torch.tensor([[[0.5, 0.25], [0.75, 0.125]]]),
        kept=torch.tensor([[[True, False], [True, True]]]),
    )
    assert routing.dense_gates(record, 3).tolist() == [[[0.5, 0, 0], [0.125, 0.75, 0]]]


def test_patch_shares_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    images, tokens, patches, experts = 2, 6, 4, 3
    gates, weight = rng.random((images, tokens, experts)), rng.normal(size=(tokens, patches))
    gates[rng.random(gates.shape) < 0.5] = 0
    found = routing.patch_shares(gates, weight)
    for b in range(images):
        for s in range(patches):
            raw = [sum(gates[b, t, e] * abs(weight[t, s]) for t in range(tokens)) for e in range(experts)]
            np.testing.assert_allclose(found[b, s], np.array(raw) / sum(raw), rtol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1)


def test_patch_shares_without_re_represent_are_the_gates_themselves() -> None:
    gates = np.array([[[0.6, 0.0, 0.2], [0.0, 0.3, 0.0]]])
    np.testing.assert_allclose(routing.patch_shares(gates, None), [[[0.75, 0, 0.25], [0, 1, 0]]])


def test_a_patch_nothing_reads_from_belongs_to_all_alike() -> None:
    gates = np.array([[[1.0, 0.0]]])
    np.testing.assert_allclose(routing.patch_shares(gates, np.array([[0.0, 2.0]])), [[[0.5, 0.5], [1.0, 0.0]]])


def test_dominant_expert_stands_out_against_the_mean_over_the_patches() -> None:
    # Expert 0 leads everywhere; expert 1 stands out in patch 1, where it is above its own mean.
    shares = np.array([[[0.9, 0.1], [0.6, 0.4]]])
    expert, strength = routing.dominant_expert(routing.PatchRouting("a", shares, False, (1, 2)))
    assert expert.tolist() == [[0, 1]]
    np.testing.assert_allclose(strength, [[0.15, 0.15]])
    expert, strength = routing.dominant_expert(routing.PatchRouting("a", shares, True, (1, 2)))
    assert expert.tolist() == [[0, 0]]
    np.testing.assert_allclose(strength, [[0.9, 0.6]])


def test_channel_patterns_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    gates, inputs = np.zeros((2, 5, 3)), rng.normal(size=(2, 5, 4))
    for b in range(2):
        for c in range(5):
            gates[b, c, rng.integers(2)] = rng.random()  # expert 2 gets none
    weight = rng.normal(size=(4, 6))
    found = routing.channel_patterns(gates, inputs, weight)

    def at(b: int, c: int, s: int) -> float:
        return sum(abs(inputs[b, c, t]) * abs(weight[t, s]) for t in range(4)) / sum(abs(weight[:, s]))

    everyone = np.array([np.mean([at(b, c, s) for b in range(2) for c in range(5)]) for s in range(6)])
    for e in range(2):
        own = [(b, c) for b in range(2) for c in range(5) if gates[b, c, e] > 0]
        mean = np.array([np.mean([at(b, c, s) for b, c in own]) for s in range(6)])
        np.testing.assert_allclose(found[e], (mean / mean.mean()) / (everyone / everyone.mean()) - 1)
    assert np.isnan(found[2]).all()


def test_trace_reads_every_sparse_layer(images: torch.Tensor) -> None:
    model = small()
    found = routing.trace(model, images)
    assert [layer.layer for layer in found.patches] == ["blocks.4.mlp_channels", "blocks.5.mlp_channels"]
    assert [layer.layer for layer in found.channels] == ["blocks.4.mlp_tokens", "blocks.5.mlp_tokens"]
    assert {layer.grid for layer in (*found.patches, *found.channels)} == {(4, 4)} and not found.unplaced
    np.testing.assert_allclose(found.logits, model(images).detach().numpy(), rtol=1e-6)
    for layer in found.patches:
        assert layer.shares.shape == (3, 16, 4) and not layer.exact
        np.testing.assert_allclose(layer.shares.sum(-1), 1)
    for layer in found.channels:
        assert layer.gates.shape == (3, 64, 8)
        assert layer.patterns.shape == (8, 16)
        np.testing.assert_array_equal((layer.gates > 0).sum(-1), 1)  # K = 1
        np.testing.assert_allclose(layer.load().sum(), 1)


def test_trace_attributes_through_the_blocks_own_weight(images: torch.Tensor) -> None:
    model = small()
    with telemetry.record(model) as records, torch.no_grad():
        model(images)
    record = records["blocks.5.mlp_channels"][0]
    weight = model.blocks[5].rerepresent_in.token_proj.weight.abs()
    raw = torch.zeros(3, 16, 4)
    for t in range(32):
        for k in range(2):
            for b in range(3):
                raw[b, :, record.experts[b, t, k]] += record.gates[b, t, k] * weight[t]
    expected = (raw / raw.sum(-1, keepdim=True)).detach().numpy()
    np.testing.assert_allclose(routing.trace(model, images).patches[1].shares, expected, rtol=1e-4)


def test_trace_is_exact_without_re_represent_layers(images: torch.Tensor) -> None:
    model = small(rerepresent=False, top_k=(1, 1))
    with telemetry.record(model) as records, torch.no_grad():
        model(images)
    (layer, _) = routing.trace(model, images).patches
    assert layer.exact
    experts, strength = routing.dominant_expert(layer)
    np.testing.assert_array_equal(experts, records["blocks.4.mlp_channels"][0].experts[..., 0].numpy())
    np.testing.assert_array_equal(strength, 1)


def test_trace_leaves_the_model_as_it_was(images: torch.Tensor) -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routing.trace(model, images)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trace_of_a_dense_model_finds_nothing(images: torch.Tensor) -> None:
    model = timm.create_model("mixer_t4_32", num_classes=3, in_chans=1, img_size=8, patch_size=2)
    found = routing.trace(model, images)
    assert found.logits.shape == (3, 3)
    assert found.patches == [] and found.channels == []


def test_order_sorts_channels_by_favourite_expert() -> None:
    gates = np.zeros((2, 4, 2))
    gates[:, 0, 1], gates[:, 1, 0], gates[:, 2, 1], gates[:, 3, 0] = 0.4, 0.3, 0.9, 0.8
    found = routing.ChannelRouting("a", gates, np.zeros((2, 1)), (1, 1))
    assert found.order().tolist() == [3, 1, 2, 0]
    assert found.load().tolist() == [0.5, 0.5]
