from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import sparse_mlp
from sparse_mlp import recipes
from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets
from sparse_mlp.jobs import from_json
from sparse_mlp.jobs.classify import ClassifyRecipe

Run = Callable[..., tuple[int, str, str]]


def test_a_run_folder_holds_all_that_is_promised(trained: Path):
    names = {path.name for path in trained.iterdir()}
    promised = """config.json environment.json inputs.json metrics.jsonl model.safetensors predictions.npz
        predictions.csv results.json report.html"""
    assert {*promised.split(), "checkpoints", "tensorboard", "figures"} <= names
    recipe = sparse_mlp.Run(trained).recipe
    assert recipe.model.args == {"patch_size": 4, "num_blocks": 2, "embed_dim": 16, "sparse_blocks": 1}
    assert recipe.train.steps == 12 and recipe.optim == recipes.get("digits_sparse").optim
    with np.load(trained / "predictions.npz") as found:
        assert found["logits"].shape == (599, 10) and sorted(found["index"]) == list(range(599))


def test_the_final_weights_have_a_lasting_name(trained: Path):
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    final, last = (load_file(folder / "model.safetensors") for folder in (trained, newest))
    assert final.keys() == last.keys() and all(torch.equal(final[name], last[name]) for name in final)


def test_eval_measures_what_the_training_ended_with(run: Run, trained: Path):
    code, out, _ = run("eval", trained)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    top1 = [line["top1"] for line in lines if line["kind"] == "eval"][-1]
    assert code == 0 and f"{top1:.2%}" in out and "599" in out


def test_eval_of_any_model_with_the_weights_of_a_file(run: Run, trained: Path):
    arguments = ["num_blocks=2", "embed_dim=16", "sparse_blocks=1", "patch_size=4"]
    weights = ["--checkpoint", trained / "model.safetensors"]
    code, out, _ = run("eval", "sparse_mlp_t4_32", *weights, "--data.name", "digits", "--model-args", *arguments)
    assert code == 0 and run("eval", trained)[1].split()[-3:-1] == out.split()[-3:-1]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The first twenty test digits as PNG files."""
    images = build_datasets(DataConfig(), AugmentConfig()).test.images[:20, 0].numpy()
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("divided", [False, True])
def test_other_images_are_evaluated_as_the_run_takes_images(run: Run, trained: Path, tmp_path: Path, divided: bool):
    """The test digits as files: their size, channels and normalisation are the run's, without an option for each."""
    test = build_datasets(DataConfig(), AugmentConfig()).test
    for part in ("train", "val") if divided else (".",):
        for i, (image, label) in enumerate(zip(test.images[:, 0].numpy(), test.labels.tolist(), strict=True)):
            folder = tmp_path / "files" / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    _, own, _ = run("eval", trained)
    code, out, err = run("eval", trained, "--data.name", "folder", "--data.root", tmp_path / "files")
    assert (code, err) == (0, "") and out.split()[-4:] == own.split()[-4:]


@pytest.mark.parametrize("how", ["files", "folder", "pattern"])
def test_predict_agrees_with_the_evaluation(run: Run, trained: Path, pictures: Path, how: str):
    files = {"files": sorted(pictures.iterdir()), "folder": [pictures], "pattern": [f"{pictures}/*.png"]}[how]
    code, out, _ = run("predict", trained, *files, "--top", "1")
    with np.load(trained / "predictions.npz") as found:
        logits = torch.from_numpy(found["logits"][:20])
    share, best = logits.softmax(1).max(1)
    expected = [f"{i:02d}.png {label} {part:.1%}" for i, (label, part) in enumerate(zip(best, share, strict=True))]
    lines = [" ".join(line.split()).rpartition("/")[2] for line in out.splitlines() if ".png" in line]
    assert code == 0 and lines == expected


def test_predict_needs_no_data_set(run: Run, trained: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise AssertionError("the data set was opened")

    monkeypatch.setattr("sparse_mlp.data.sets.read_digits", fail)
    assert run("predict", trained, pictures)[0] == 0


def test_predict_shows_the_readable_of_several_and_fails_all_the_same(run: Run, trained: Path, pictures: Path):
    (pictures / "00.png").write_text("no picture")
    code, out, err = run("predict", trained, pictures)
    assert code == 2 and err.count("\n") == 1 and "00.png: not an image" in err
    # The table may break a long path anywhere, and the row of the bad file says twice what it is called.
    assert out.count(".png") in (20, 21)


def test_report_writes_the_page_anew(run: Run, trained: Path):
    (trained / "report.html").unlink()
    code, out, _ = run("report", trained)
    assert code == 0 and (trained / "report.html").is_file() and "report.html" in out


def test_report_shows_what_the_experts_do_with_own_images(run: Run, trained: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 200, 10)).save(photos / f"<b>{number}.png")
    (photos / "broken.png").write_text("none")
    before = (trained / "report.html").read_bytes()
    code, out, _ = run("report", trained, "--images", photos)
    assert code == 0 and "routing.html" in out
    page = (trained / "routing.html").read_text()
    assert "Explore the routing" in page and "&lt;b&gt;0.png" in page and "<b>" not in page
    assert "taken for" in page and "recognised" not in page
    assert (trained / "report.html").read_bytes() == before


def test_info_counts_as_the_model_does(run: Run):
    code, out, _ = run("info", "sparse_mlp_t4_32")
    model = timm.create_model("sparse_mlp_t4_32", num_classes=10)
    assert code == 0 and f"{sum(p.numel() for p in model.parameters()):,} parameters" in out
    assert "blocks.5.mlp_channels" in out and "dropless" in out


def test_info_of_a_dense_model_counts_its_products(run: Run):
    """Mixer-B/16 has 12.62 G multiply-adds (12.6 in the published tables)."""
    _, out, _ = run("info", "mixer_b16_224")
    assert "59,880,472 parameters" in out and "12,6" in out


def test_info_of_a_run(run: Run, trained: Path):
    code, out, _ = run("info", trained)
    assert code == 0 and "1x8x8" in out and "blocks.1.mlp_tokens" in out


def test_info_plans_for_gpus_and_says_what_it_assumes(run: Run):
    code, out, _ = run("info", "sparse_mlp_t4_32", "--gpus", "4", "--batch", "64", "--link", "12")
    rows = [line.strip() for line in out.splitlines() if " x " in line]
    assert code == 0 and len(rows) == 1 + 6, "a header; 4 x 1, 2 x 2, 1 x 4, each sharded or not"
    assert "a step of 64 images on 4 GPUs, 16 each" in out
    assert "Times are estimates, not measured" in out and "12 GB/s beyond" in out


def test_info_of_a_plan_names_the_meshes_that_do_not_fit(run: Run):
    _, out, _ = run("info", "sparse_mlp_t4_32", "--gpus", "4", "--memory", "0.01")
    assert out.count("over 0.01 GiB") == 6


def test_info_plans_for_a_model_that_no_machine_here_could_hold(run: Run):
    _, out, _ = run("info", "sparse_mlp_t4_32", "--args", "num_experts=(4096,4096)", "--gpus", "4096", "--amp", "bf16")
    assert "4,096 GPUs, 64 each" in out and "14 more meshes, each behind these" in out


def test_info_plans_for_a_run(run: Run, trained: Path):
    code, out, _ = run("info", trained, "--gpus", "2", "--batch", "8")
    assert code == 0 and "1 x 2" in out


def test_models_lists_ours_and_on_request_all(run: Run):
    assert "sparse_mlp_b16_224" in run("models")[1]
    code, out, _ = run("models", "mixer_b16", "--all")
    assert code == 0 and "mixer_b16_224" in out.split()


def test_recipes_lists_and_shows(run: Run):
    _, out, _ = run("recipes")
    assert all(name in out for name in recipes.RECIPES)
    _, out, _ = run("recipes", "digits_sparse")
    assert from_json(ClassifyRecipe, json.loads(out[out.index("{") :])) == recipes.get("digits_sparse")


def test_resuming_a_finished_run_changes_nothing(run: Run, trained: Path, tmp_path: Path):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    code, _, _ = run("train", "--resume", copy, "--train.log-every", "3")
    assert code == 0
    assert (copy / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_new_runs_are_numbered(run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("train", "digits_mixer", *tiny[: tiny.index("sparse_blocks=1")], *tiny[5:])[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits_mixer", "digits_mixer-2"]


def test_another_model_does_not_inherit_the_arguments_of_the_recipes(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, _, _ = run("train", "digits_sparse", "--model.name", "resnet10t", *tiny[5:])
    assert code == 0 and sparse_mlp.Run(Path("runs/digits_sparse")).recipe.model.args == {}


def test_compare_trains_each_once_and_ends_with_a_table(run: Run, tiny: list[str], tmp_path: Path):
    options = [tmp_path, *tiny[5:], "--model.args", "num_blocks=2", "embed_dim=16"]
    code, out, err = run("compare", "digits_sparse", "digits_mixer", "--out", *options)
    assert code == 0 and "training" in err
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith("digits_")}
    assert rows.keys() == {"digits_sparse", "digits_mixer"}
    assert "x its share" in rows["digits_sparse"] and "dense" in rows["digits_mixer"]
    assert (tmp_path / "comparison.html").is_file()
    before = (tmp_path / "digits_sparse" / "metrics.jsonl").read_bytes()
    (tmp_path / "digits_mixer" / "results.json").unlink()  # as if it had been stopped
    code, _, err = run("compare", "digits_sparse", "digits_mixer", "--out", *options)
    assert code == 0 and "digits_sparse: finished before" in err and "digits_mixer: going on" in err
    assert (tmp_path / "digits_sparse" / "metrics.jsonl").read_bytes() == before
    code, _, err = run("compare", "digits_sparse", "digits_mixer", "--out", *options, "--optim.lr", "1")
    assert code == 2 and "optim.lr was" in err
