"""What telemetry says, against numbers counted by hand."""

import pytest
import torch

from sparse_mlp.moe import MoeMlp, telemetry


def test_statistics_of_a_training_forward_by_hand() -> None:
    layer = MoeMlp(3, 4, 3, 1, noise_std=0.0)
    layer.router.weight.data = torch.eye(3) * 100
    layer(torch.eye(3)[[0, 0, 0, 1]])  # three items to expert 0, one to expert 1
    stats = telemetry.collect(layer)[""].to_dict()
    assert stats["load"] == [0.75, 0.25, 0.0]
    assert stats["importance"] == pytest.approx([0.75, 0.25, 0.0])
    assert stats["dropped"] == 0.0
    assert stats["entropy"] == pytest.approx(0.0, abs=1e-5)
    # L_imp: variance of (3, 1, 0) is 14/9, squared mean 16/9 -> 0.875; half of it, no load loss without noise
    assert stats["balance_loss"] == pytest.approx(0.4375)
    layer.router.weight.data.zero_()
    layer(torch.randn(9, 3))
    assert telemetry.collect(layer)[""].entropy.item() == pytest.approx(1.0)


def test_evaluation_leaves_the_statistics_alone() -> None:
    layer = MoeMlp(3, 4, 3)
    layer(torch.randn(5, 3))
    before = telemetry.collect(layer)[""].to_dict()
    layer.eval()(torch.randn(7, 3))
    assert telemetry.collect(layer)[""].to_dict() == before


def test_record_sees_each_item_and_stops_after_the_block() -> None:
    layer = MoeMlp(6, 4, 3, 2).eval()
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), layer)
    x = torch.randn(2, 5, 6)
    with telemetry.record(model) as records:
        model(x)
        model(x[:1])
    model(x)
    assert list(records) == ["1"]
    first, second = records["1"]
    assert first.experts.shape == first.gates.shape == first.kept.shape == (2, 5, 2)
    assert second.experts.shape == (1, 5, 2)
    assert not first.gates.requires_grad
    items = model[0](x).reshape(-1, 6)
    wanted = (items @ layer.router.weight.t()).softmax(-1).topk(2)
    assert torch.equal(first.experts.view(-1, 2), wanted.indices)


def test_a_dense_model_has_nothing_to_tell() -> None:
    model = torch.nn.Linear(3, 3)
    assert telemetry.collect(model) == {}
    with telemetry.record(model) as records:
        model(torch.randn(1, 3))
    assert records == {}


def test_a_forward_without_items_is_recorded_too() -> None:
    layer = MoeMlp(8, 4, 4, 2).eval()
    with telemetry.record(layer) as records:
        layer(torch.zeros(0, 3, 8))
    assert records[""][0].experts.shape == (0, 3, 2)
