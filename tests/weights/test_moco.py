from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from sparse_mlp import weights
from sparse_mlp.weights.moco import from_moco


def published(model: torch.nn.Module, projector: str) -> dict[str, object]:
    """A checkpoint as moco-v3's main_moco.py writes it: DDP's prefix, two encoders, projectors in place of the head."""
    head = projector.removesuffix(".")
    state = {}
    for encoder, shift in (("base_encoder", 0.0), ("momentum_encoder", 1.0)):
        for name, value in model.state_dict().items():
            if not name.startswith(projector):
                state[f"module.{encoder}.{name}"] = value + shift
        state[f"module.{encoder}.{head}.0.weight"] = torch.ones(4096, 8)
        state[f"module.{encoder}.{head}.1.running_mean"] = torch.ones(4096)
    state["module.predictor.0.weight"] = torch.ones(4096, 256)
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}}}


@pytest.mark.parametrize(
    ("name", "projector", "arguments"),
    [
        ("resnet10t", "fc.", {}),
        ("mixer_t4_32", "head.", {"num_blocks": 1}),
        ("sparse_mlp_t4_32", "head.", {"num_blocks": 1, "sparse_blocks": 1}),
    ],
)
def test_the_trained_encoder_is_read_and_the_head_stays_new(name: str, projector: str, arguments: dict, tmp_path: Path):
    source, target = (timm.create_model(name, num_classes=5, **arguments) for _ in range(2))
    torch.save(published(source, projector), tmp_path / "moco.pth.tar")
    head = {key: value.clone() for key, value in target.state_dict().items() if key.startswith(projector)}
    weights.load(target, tmp_path / "moco.pth.tar", new_head=True)
    for key, value in target.state_dict().items():
        expected = head[key] if key in head else source.state_dict()[key]
        assert torch.equal(value, expected), key


def test_other_state_dicts_pass_unchanged():
    state = {"head.weight": torch.ones(1), "predictor.weight": torch.ones(1)}
    assert from_moco(state) == state


def test_a_checkpoint_without_the_trained_encoder():
    with pytest.raises(ValueError, match=r"without base_encoder\.\*"):
        from_moco({"momentum_encoder.stem.weight": torch.ones(1)})


def test_without_a_new_head_its_absence_is_an_error(tmp_path: Path):
    model = timm.create_model("resnet10t", num_classes=5)
    bare = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"2 missing \(fc.weight, fc.bias\)"):
        weights.load(model, tmp_path / "bare.safetensors")


def test_a_model_without_a_head_takes_the_rest_of_one_that_has(tmp_path: Path):
    source = timm.create_model("resnet10t", num_classes=5)
    save_file(source.state_dict(), tmp_path / "whole.safetensors")
    target = timm.create_model("resnet10t", num_classes=0)
    weights.load(target, tmp_path / "whole.safetensors", new_head=True)
    assert torch.equal(target.conv1[0].weight, source.conv1[0].weight)


def test_an_encoder_of_another_architecture_lists_the_names(tmp_path: Path):
    torch.save(published(timm.create_model("resnet10t"), "fc."), tmp_path / "moco.pth")
    with pytest.raises(ValueError, match=r"matched, .* missing \(stem.* unexpected \(conv1") as error:
        weights.load(timm.create_model("mixer_t4_32", num_blocks=1), tmp_path / "moco.pth", new_head=True)
    assert "\n" not in str(error.value)
