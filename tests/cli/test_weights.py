"""Recipes that begin with weights, and export: from any source of weights to a run or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open

import sparse_mlp
from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets
from sparse_mlp.jobs.images import load_trained

Run = Callable[..., tuple[int, str, str]]

MODEL = ["--model.name", "sparse_mlp_t4_32", "--model.args"]
ARGUMENTS = ["num_blocks=2", "embed_dim=16", "sparse_blocks=1", "patch_size=4"]
SHORT = ["--train.epochs", "2"]


@pytest.fixture
def bare(trained: Path, tmp_path: Path) -> Path:
    """The backbone of the trained run as a file, without its classifier."""
    weights = load_file(trained / "model.safetensors")
    path = tmp_path / "bare.pth"
    torch.save({name: value for name, value in weights.items() if not name.startswith("head.")}, path)
    return path


@pytest.fixture
def moco(trained: Path, tmp_path: Path) -> Path:
    """The same as moco-v3 would have published it."""
    weights = load_file(trained / "model.safetensors")
    state = {
        f"module.{encoder}.{name}": value
        for encoder in ("base_encoder", "momentum_encoder")
        for name, value in weights.items()
        if not name.startswith("head.")
    }
    path = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 3, "state_dict": state | {"module.base_encoder.head.0.weight": torch.ones(4, 16)}}, path)
    return path


def backbone(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(path).items() if not name.startswith("head.")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def probe(source: Path, recipe: str = "linear_probe") -> list[str | Path]:
    return ["train", recipe, "--model.weights", source]


def test_what_was_trained_without_its_final_norm_is_probed_without_it(
    run: Run, trained: Path, tiny: list[str], tmp_path: Path
):
    assert run("train", "digits_sparse", *tiny, "--model.no-final-norm", "--out", tmp_path / "run")[0] == 0
    assert run(*probe(tmp_path / "run"), *SHORT, "--out", tmp_path / "probe")[0] == 0
    stored = sparse_mlp.Run(tmp_path / "probe")
    assert not stored.recipe.model.final_norm
    assert sparse_mlp.Run(trained).recipe.model.final_norm
    assert type(load_trained(stored.folder).norm).__name__ == "SkippedNorm"


def test_a_probe_leaves_the_backbone_as_it_was_and_fits_its_settings_to_the_images(
    run: Run, trained: Path, tmp_path: Path
):
    assert run(*probe(trained), *SHORT, "--out", tmp_path / "probe")[0] == 0
    assert same(backbone(tmp_path / "probe" / "model.safetensors"), backbone(trained / "model.safetensors"))
    recipe = sparse_mlp.Run(tmp_path / "probe").recipe
    assert recipe.model.args == sparse_mlp.Run(trained).recipe.model.args and recipe.data.name == "digits"
    assert recipe.data.batch_size == 64 and recipe.optim.lr == 3 * 64 / 256, "the rate follows the batch"
    assert recipe.augment.crop_scale == (1, 1) and recipe.augment.flip == 0


def test_a_probe_is_a_run_like_any_other(run: Run, trained: Path, tmp_path: Path):
    folder = tmp_path / "probe"
    assert run(*probe(trained), *SHORT, "--out", folder)[0] == 0
    before = (folder / "model.safetensors").read_bytes()
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    newest.rename(tmp_path / "gone")
    assert run("train", "--resume", folder)[0] == 0
    assert (folder / "model.safetensors").read_bytes() == before
    assert run("eval", folder)[0] == 0 and (folder / "report.html").is_file()


def test_nearest_neighbours_agree_for_every_form_of_the_same_weights(
    run: Run, trained: Path, bare: Path, moco: Path, tmp_path: Path
):
    options = ["--task.k", "5", "--out"]
    named = ["--data.name", "digits", *MODEL, *ARGUMENTS, *options]
    assert run(*probe(trained, "knn"), *options, tmp_path / "run")[0] == 0
    for source in (bare, moco):
        assert run(*probe(source, "knn"), *named, tmp_path / source.stem)[0] == 0
    metrics = [sparse_mlp.Run(tmp_path / name).metrics for name in ("run", bare.stem, moco.stem)]
    assert metrics[0] == metrics[1] == metrics[2] and metrics[0]["images"] == 599
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_knn_run_predicts_as_it_evaluated(run: Run, trained: Path, tmp_path: Path):
    assert run(*probe(trained, "knn"), "--out", tmp_path / "run")[0] == 0
    image = build_datasets(DataConfig(), AugmentConfig()).test.images[0, 0].numpy()
    Image.fromarray(image).save(tmp_path / "digit.png")
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        logits = found["logits"][list(found["index"]).index(0)]
    (row,) = sparse_mlp.Run(tmp_path / "run").predict(tmp_path / "digit.png")
    assert row["class_1"] == str(logits.argmax())
    assert row["probability_1"] == pytest.approx(np.exp(logits.max()), abs=1e-4)


def test_finetune_from_a_file_with_other_classes(run: Run, bare: Path, tmp_path: Path):
    length = ["--train.epochs", "1", "--data.batch-size", "64"]
    options = ["--data.name", "digits", *MODEL, *ARGUMENTS, *length, "--optim.layer-decay", "0.7"]
    code, _, err = run(*probe(bare, "finetune"), *options, "--out", tmp_path / "run")
    assert code == 0, err
    recipe = sparse_mlp.Run(tmp_path / "run").recipe
    assert recipe.model.args["drop_path_rate"] == 0.1 and recipe.model.args["embed_dim"] == 16
    assert recipe.optim.lr == pytest.approx(5e-4 * 64 / 512) and recipe.augment.mixup == 0.8
    assert recipe.augment.auto_augment is None, "the digits are grey"
    assert recipe.schedule.min_lr < recipe.optim.lr
    assert not same(backbone(tmp_path / "run" / "model.safetensors"), torch.load(bare)), "all of it is trained"


def test_a_tenth_of_the_labels(run: Run, trained: Path, tmp_path: Path):
    options = ["--data.batch-size", "32", "--train.epochs", "2"]
    code, _, err = run(*probe(trained, "semi_supervised"), *options, "--out", tmp_path / "run")
    assert code == 0, err
    recipe = sparse_mlp.Run(tmp_path / "run").recipe
    assert recipe.model.args == {**sparse_mlp.Run(trained).recipe.model.args, "drop_path_rate": 0.1}
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 2 * (120 // 32), "a tenth of 1,198 images, in whole batches"


def test_any_recipe_begins_with_weights(run: Run, trained: Path, tmp_path: Path):
    options = ["--model.weights", trained, "--model.args", *ARGUMENTS, *SHORT, "--out", tmp_path / "run"]
    code, _, err = run("train", "digits_sparse", *options)
    assert code == 0, err
    assert not same(backbone(tmp_path / "run" / "model.safetensors"), backbone(trained / "model.safetensors"))


@pytest.mark.slow  # pre-trains for a minute: the features of an untrained model say nothing of the probe
def test_the_probe_of_the_digits_is_at_least_its_nearest_neighbours(run: Run, tmp_path: Path):
    options = ["--train.epochs", "60", "--train.eval-every", "0", "--task.knn-images", "1000"]
    args = ["--model.args", "num_blocks=2", "embed_dim=32", "sparse_blocks=1"]
    assert run("train", "digits_moco_sparse", *options, *args, "--out", tmp_path / "moco")[0] == 0
    for recipe in ("linear_probe", "knn"):
        assert run(*probe(tmp_path / "moco", recipe), "--out", tmp_path / recipe)[0] == 0
    linear, neighbours = (sparse_mlp.Run(tmp_path / name).metrics["top1"] for name in ("linear_probe", "knn"))
    assert linear >= neighbours, f"{linear:.4f} and {neighbours:.4f}"


def test_export_is_loaded_by_plain_timm(run: Run, trained: Path, tmp_path: Path):
    target = tmp_path / "backbone.safetensors"
    code, out, _ = run("export", trained, target)
    assert code == 0
    calls = re.findall(r"^timm\.create_model\(.*\)$", out, flags=re.MULTILINE)
    assert len(calls) == 2
    model, with_head = (eval(call, {"timm": timm}) for call in calls)
    assert same(dict(model.state_dict()), backbone(trained / "model.safetensors"))
    assert all(torch.equal(with_head.state_dict()[name], value) for name, value in model.state_dict().items())
    assert with_head.num_classes == 10 and model(torch.zeros(1, 1, 8, 8)).shape == (1, 16)
    with safe_open(target, "pt") as file:
        stored = file.metadata()
    assert stored["model"] == "sparse_mlp_t4_32" and json.loads(stored["args"])["embed_dim"] == 16
