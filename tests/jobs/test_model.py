from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp import recipes
from sparse_mlp.data import InputSpec
from sparse_mlp.engine import RunFolder
from sparse_mlp.jobs import ModelConfig, build_model, load_model
from sparse_mlp.jobs.classify import ClassifyJob
from sparse_mlp.jobs.images import load_inputs

SPEC = InputSpec(tuple("abcd"), 1, 16, (0.5,), (0.5,), 1.0)
SMALL = ModelConfig("sparse_mlp_t4_32", {"num_blocks": 2, "embed_dim": 16, "sparse_blocks": 1})


def small(**arguments: Any) -> ModelConfig:
    return replace(SMALL, args={**SMALL.args, **arguments})


def test_size_channels_and_classes_come_from_the_data():
    model = build_model(SMALL, SPEC)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 4)


def test_models_of_any_image_size_need_no_size():
    model = build_model(ModelConfig("resnet10t"), replace(SPEC, image_size=32))
    assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("sparse_mlp_t4_23"), "nearest: sparse_mlp_t4_32"),
        (ModelConfig("resnet5o"), "nearest: resnet50"),
        (small(topk=3), "unknown argument 'topk'; nearest: top_k"),
        (small(top_k=(9, 2)), "top_k"),
        (small(capacity_ratio=0), "capacity_ratio must be above 0"),
        (small(patch_size=5), "divisible"),
        (small(num_classes=7), "num_classes=7 cannot be set"),
        (ModelConfig("mixer_t4_32", {"patch_size": 5}), "image size 16 is not divisible by its patch size 5"),
        (ModelConfig("vgg11"), "vgg11"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(config: ModelConfig, message: str):
    with pytest.raises(ValueError, match=message) as error:
        build_model(config, SPEC)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested"])
def test_weights_come_back_from_any_kind_of_file(tmp_path: Path, kind: str):
    model = build_model(SMALL, SPEC)
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()} if kind == "nested" else model.state_dict(), path)
    loaded = load_model(SMALL, SPEC, path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert not loaded.training


def test_fine_tuning_keeps_a_new_head_for_other_classes(tmp_path: Path):
    model = build_model(SMALL, SPEC)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    config = replace(SMALL, weights=str(tmp_path / "w.safetensors"))
    tuned = build_model(config, replace(SPEC, classes=tuple("abcdefg")))
    assert tuned.head.weight.shape[0] == 7
    assert torch.equal(tuned.stem.proj.weight, model.stem.proj.weight)


def test_weights_of_another_model_list_matched_missing_and_unexpected(tmp_path: Path):
    torch.save(timm.create_model("resnet10t", num_classes=4).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"0 matched, \d+ missing \(stem.*\d+ unexpected \(") as error:
        load_model(SMALL, SPEC, tmp_path / "resnet.pth")
    assert "\n" not in str(error.value)


def test_weights_of_another_width_are_told_by_shape(tmp_path: Path):
    save_file(build_model(small(embed_dim=32), SPEC).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="of another shape"):
        load_model(SMALL, SPEC, tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_damaged_weights_are_named(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=f"{name} holds no weights") as error:
        load_model(SMALL, SPEC, tmp_path / name)
    assert "\n" not in str(error.value)


def test_weights_are_not_executed(tmp_path: Path):
    torch.save({"head.weight": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(SMALL, SPEC, tmp_path / "code.pth")


def test_missing_weights_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_model(SMALL, SPEC, tmp_path / "nothing.pth")


def test_a_job_is_drawn_from_the_seed_alone():
    recipe = recipes.get("digits_sparse")
    first = ClassifyJob(recipe)
    torch.manual_seed(99)
    second = ClassifyJob(recipe)
    other = ClassifyJob(replace(recipe, train=replace(recipe.train, seed=1)))
    weights = [job.task.backbone().stem.proj.weight for job in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    batches = [next(iter(job.loaders.train(start_step=3, steps=1, rank=0, world_size=1))) for job in (first, second)]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert (first.loaders.batch_size, first.loaders.steps_per_epoch) == (128, 9)


def test_inputs_are_remembered(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "inputs.json").write_text(json.dumps(asdict(SPEC)))
    assert load_inputs(RunFolder.open(tmp_path)) == SPEC


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_dense_recipe_has_the_sparse_ones_multiply_adds(data: str) -> None:
    """Counted on a blank image of the set's size."""
    size, channels = {"digits": (8, 1), "cifar10": (32, 3)}[data]
    spec = InputSpec(tuple("0123456789"), channels, size, mean=(0.5,), std=(0.5,), crop_pct=1.0)
    counted = []
    for family in ("sparse", "mixer"):
        model = build_model(recipes.get(f"{data}_{family}").model, spec).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, channels, size, size))
        counted.append(counter.get_total_flops())
    assert counted[0] == pytest.approx(counted[1], rel=0.01)
