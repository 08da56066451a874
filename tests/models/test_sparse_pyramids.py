"""AS-MLP, CycleMLP and Hire-MLP with experts in their last blocks."""

from __future__ import annotations

import pytest
import timm
import torch

from sparse_mlp.models import registered_names
from sparse_mlp.moe.telemetry import moe_layers
from sparse_mlp.weights import convert, load

DENSE = [name for name in registered_names() if name.startswith(("as_mlp", "cycle_mlp", "hire_mlp"))]
SMALL = ["as_mlp_tiny", "cycle_mlp_b1", "hire_mlp_tiny"]


@pytest.mark.parametrize("name", DENSE)
def test_every_variant_has_its_sparse_one_with_experts_in_the_last_blocks_of_two_stages(name: str) -> None:
    dense, sparse = (timm.create_model(one, device="meta") for one in (name, f"sparse_{name}"))
    layers = moe_layers(sparse)
    last = [f"stages.{i}.blocks.{len(dense.stages[i].blocks) - 1}.mlp" for i in (2, 3)]
    assert list(layers) == last
    for layer_name, layer in layers.items():
        assert (layer.num_experts, layer.top_k) == (8, 1)
        dim, hidden_dim = (dense.get_submodule(layer_name).fc1.weight.shape[i] for i in (1, 0))
        assert layer.experts.fc1.weight.shape == (8, dim, hidden_dim)


@pytest.mark.parametrize("size", [(65, 97), (224, 224)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_the_authors_dense_weights_are_upcycled_and_the_answers_are_the_dense_ones(reference, name, size, tmp_path):
    """By timm's `pretrained`, by `weights.load` and by `weights.convert`."""
    published, state_dict = reference.weights(name)
    file = tmp_path / "published.pth"
    torch.save({"model": {f"module.{key}": value for key, value in state_dict.items()}}, file)
    images = reference.images(1, *size)
    models = [timm.create_model(f"sparse_{name}", pretrained=True, pretrained_cfg_overlay={"file": str(file)})]
    models.append(timm.create_model(f"sparse_{name}", top_k=2))
    load(models[-1], file)
    models.append(timm.create_model(f"sparse_{name}"))
    models[-1].load_state_dict(convert(state_dict, f"sparse_{name}"))
    with torch.inference_mode():
        expected = published(images)
        for model in models:
            assert (model.eval()(images) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_its_own_weights_come_back(name: str, tmp_path) -> None:
    model = timm.create_model(f"sparse_{name}", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = timm.create_model(f"sparse_{name}", num_classes=5)
    load(again, tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_arguments_of_the_experts() -> None:
    model = timm.create_model(
        "sparse_cycle_mlp_b1", sparse_blocks="every-2", num_experts=4, top_k=2, capacity_ratio=1.05, prioritized=True
    )
    layers = list(moe_layers(model).values())
    assert len(layers) == 5
    assert (layers[0].num_experts, layers[0].top_k, layers[0].capacity_ratio) == (4, 2, 1.05)
    assert layers[0].capacity_group == "image" and layers[0].prioritized
    with pytest.raises(ValueError, match="top_k would be ignored without sparse_blocks"):
        timm.create_model("cycle_mlp_b1", top_k=2)
    with pytest.raises(ValueError, match="blocks 11 does not fit a model of 10 blocks"):
        timm.create_model("sparse_cycle_mlp_b1", sparse_blocks=11)


def test_the_experts_begin_different() -> None:
    weight = timm.create_model("sparse_cycle_mlp_b1").stages[3].blocks[1].mlp.experts.fc1.weight
    assert not torch.equal(weight[0], weight[1])
