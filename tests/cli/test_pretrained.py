"""probe, finetune, transfer and export-backbone: from any source of weights to a run or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, safe_open

from sparse_mlp import recipes

Run = Callable[..., tuple[int, str, str]]

MODEL = ["--model.name", "sparse_mlp_t4_32", "--model.args"]
ARGUMENTS = ["num_blocks=2", "embed_dim=16", "sparse_blocks=1", "patch_size=4"]
# Two epochs of 9 steps on the grey digits, which know no RandAugment and are no images to crop.
PROBE = ["--train.epochs", "2", "--data.batch-size", "128", "--augment.flip", "0"]


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


def test_what_was_trained_without_its_final_norm_is_probed_without_it(
    run: Run, trained: Path, tiny: list[str], tmp_path: Path
):
    assert run("train", "digits_sparse", *tiny, "--model.no-final-norm", "--out", tmp_path / "run")[0] == 0
    assert run("probe", tmp_path / "run", *PROBE, "--kind", "linear", "--out", tmp_path / "probe")[0] == 0
    stored = recipes.load(tmp_path / "probe")
    assert not stored.model.final_norm
    assert recipes.load(trained).model.final_norm
    model = recipes.load_model(stored.model, recipes.load_inputs(tmp_path / "probe"), tmp_path / "probe")
    assert type(model.norm).__name__ == "SkippedNorm"


def test_probe_measures_both_ways_and_leaves_the_backbone_as_it_was(run: Run, trained: Path, tmp_path: Path):
    code, out, _ = run("probe", trained, *PROBE, "--out", tmp_path / "probe")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip().startswith(("linear", "knn"))}
    assert rows.keys() == {"linear", "knn"} and rows["knn"][-1] == "599"
    assert same(backbone(tmp_path / "probe" / "model.safetensors"), backbone(trained / "model.safetensors"))
    stored = json.loads((tmp_path / "probe" / "knn.json").read_text())
    assert rows["knn"][1] == f"{stored['top1']:.2%}" and stored["k"] == 20
    recipe = recipes.load(tmp_path / "probe")
    assert recipe.model.args == recipes.load(trained).model.args and recipe.data.name == "digits"
    assert recipe.optim.lr == 3 * 128 / 256, "the rate follows the batch"


def test_a_probe_is_a_run_like_any_other(run: Run, trained: Path, tmp_path: Path):
    folder = tmp_path / "probe"
    assert run("probe", trained, *PROBE, "--kind", "linear", "--out", folder)[0] == 0
    before = (folder / "model.safetensors").read_bytes()
    (folder / "checkpoints" / "step_00000018").rename(tmp_path / "gone")
    assert run("train", "--resume", folder)[0] == 0
    assert (folder / "model.safetensors").read_bytes() == before
    assert run("eval", folder)[0] == 0 and (folder / "report.html").is_file()


def test_nearest_neighbours_agree_for_every_form_of_the_same_weights(run: Run, trained: Path, bare: Path, moco: Path):
    knn = ["--kind", "knn", "--k", "5"]
    options = [*knn, "--data.name", "digits", *MODEL, *ARGUMENTS]
    lines = [
        run("probe", trained, *knn)[1].splitlines()[-2].split(),
        *(run("probe", source, *options)[1].splitlines()[-2].split() for source in (bare, moco)),
    ]
    assert lines[0] == lines[1] == lines[2] and lines[0][0] == "knn"


def test_finetune_by_deits_recipe_from_a_file_with_other_classes(run: Run, bare: Path, tmp_path: Path):
    colours = ["--augment.auto-augment", "None", "--augment.flip", "0"]
    length = ["--train.epochs", "1", "--schedule.warmup-epochs", "0.3", "--data.batch-size", "64"]
    options = ["--data.name", "digits", *MODEL, *ARGUMENTS, *colours, *length, "--optim.layer-decay", "0.7"]
    code, _, err = run("finetune", bare, *options, "--out", tmp_path / "run")
    assert code == 0, err
    recipe = recipes.load(tmp_path / "run")
    assert recipe.model.args["drop_path_rate"] == 0.1 and recipe.model.args["embed_dim"] == 16
    assert recipe.optim.lr == pytest.approx(5e-4 * 64 / 512) and recipe.augment.mixup == 0.8
    assert recipe.schedule.min_lr < recipe.optim.lr
    assert not same(backbone(tmp_path / "run" / "model.safetensors"), torch.load(bare)), "all of it is trained"


def test_finetune_by_another_recipe_on_a_tenth_of_the_labels(run: Run, trained: Path, tmp_path: Path):
    length = ["--train.epochs", "2", "--schedule.warmup-epochs", "0"]
    options = ["--data.label-share", "0.1", "--data.batch-size", "32", *length]
    code, _, err = run("finetune", trained, "digits_sparse", *options, "--out", tmp_path)
    assert code == 0, err
    recipe = recipes.load(tmp_path)
    assert recipe.model.args == recipes.load(trained).model.args, "not those of the recipe"
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 2 * (120 // 32), "a tenth of 1,198 images, in whole batches"


@pytest.mark.slow  # 2,000 images through a tiny model, and reading CIFAR-100: about 8 s
def test_transfer_to_a_fifth_of_cifar100(run: Run, tmp_path: Path, data_root: Path):
    source = tmp_path / "pretrained"
    model = ["--model.name", "mixer_t4_32", "--model.args", "num_blocks=1", "embed_dim=16"]
    short = ["--train.epochs", "None", "--train.steps", "2", "--schedule.warmup-epochs", "None"]
    data = ["--data.root", data_root / "cifar100", "--data.batch-size", "32"]
    code, _, err = run("train", "transfer_cifar100_fifth", *model, *short, *data, "--out", source)
    assert code == 0, err
    code, _, err = run("transfer", source, "cifar100_fifth", *short, *data, "--out", tmp_path / "run")
    assert code == 0, err
    recipe = recipes.load(tmp_path / "run")
    assert recipe.model.name == "mixer_t4_32" and recipe.model.weights == str(source.resolve())
    assert recipe.optim.weight_decay == 0.1 and recipe.optim.lr == pytest.approx(3e-4 * 32 / 1024)


def test_export_is_loaded_by_plain_timm(run: Run, trained: Path, tmp_path: Path):
    target = tmp_path / "backbone.safetensors"
    code, out, _ = run("export-backbone", trained, target)
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


@pytest.mark.parametrize("command", ["probe", "finetune", "transfer"])
def test_help_explains_without_a_source(run: Run, command: str):
    code, out, _ = run(command, "--help")
    assert code == 0 and "SOURCE is a run folder" in out and "--optim.lr" in out
