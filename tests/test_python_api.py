"""What a script or a notebook uses: recipes, runs, and datasets of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import sparse_mlp
from sparse_mlp.errors import UserError

TINY = {"args": {"num_blocks": 2, "embed_dim": 16, "sparse_blocks": 1, "patch_size": 4}}


class Stripes(Dataset):
    """8x8 grey images with a stripe across or down; draws noise as a user's augmentation would."""

    classes = ("across", "down")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = (torch.rand(8, 8) * 60).to(torch.uint8).numpy()
        down = index % 2
        line = index // 2 % 8
        pixels[(slice(None), line) if down else (line, slice(None))] = 250
        return Image.fromarray(np.ascontiguousarray(pixels)), down


@pytest.fixture(scope="module")
def recipe() -> sparse_mlp.jobs.Recipe:
    return sparse_mlp.recipe(
        "digits_sparse", model=TINY, data={"batch_size": 16}, train={"steps": 24, "save_every": 8, "keep": 9}
    )


@pytest.fixture(scope="module")
def run(recipe: sparse_mlp.jobs.Recipe, tmp_path_factory: pytest.TempPathFactory) -> sparse_mlp.Run:
    out = tmp_path_factory.mktemp("own") / "run"
    return sparse_mlp.train(recipe, out, datasets=(Stripes(64), Stripes(20)), show=False)


def test_a_dataset_of_ones_own_is_trained_on(run: sparse_mlp.Run, tmp_path: Path) -> None:
    assert run.metrics["images"] == 20 and run.metrics["top1"] > 0.6
    assert run.recipe.data.name == "own"
    Stripes(2)[1][0].save(tmp_path / "x.png")
    (row,) = run.predict(tmp_path / "x.png")
    assert row["class_1"] in Stripes.classes


def test_it_is_resumed_to_the_bit(run: sparse_mlp.Run, recipe: sparse_mlp.jobs.Recipe, tmp_path: Path) -> None:
    sets = (Stripes(64), Stripes(20))
    other = sparse_mlp.train(recipe, tmp_path / "run", datasets=sets, show=False)
    for checkpoint in sorted((other.path / "checkpoints").iterdir())[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(UserError, match="pass them as `datasets` again"):
        sparse_mlp.resume(other.path, show=False)
    sparse_mlp.resume(other.path, datasets=sets, show=False)
    assert (other.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()


def test_a_run_is_a_folder_and_what_can_be_done_with_it(tmp_path: Path) -> None:
    recipe = sparse_mlp.recipe("digits_mixer", model={"args": {"num_blocks": 1, "embed_dim": 16}}, train={"steps": 4})
    run = sparse_mlp.train(recipe, tmp_path / "run", show=False)
    again = sparse_mlp.Run(tmp_path / "run")
    assert again == run and again.recipe == recipe
    assert again.evaluate() == pytest.approx(run.metrics)
    assert again.report() == tmp_path / "run" / "report.html"
    assert "timm.create_model('mixer_t4_32'" in again.export(tmp_path / "weights.safetensors")


def test_a_run_without_a_name_for_its_folder_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = sparse_mlp.recipe("digits_mixer", model={"args": {"num_blocks": 1, "embed_dim": 16}}, train={"steps": 1})
    paths = [sparse_mlp.train(recipe, show=False).path for _ in range(2)]
    assert paths == [Path("runs/digits_mixer"), Path("runs/digits_mixer-2")]


def test_what_there_is_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sparse_mlp.trian  # noqa: B018
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        sparse_mlp.Run(Path("/no/such/run")).recipe  # noqa: B018


@pytest.mark.parametrize("value", [Path("/photos"), "/photos"])
def test_a_path_is_as_good_as_its_name(value: Path | str) -> None:
    changes = {"name": "folder", "root": value}
    assert sparse_mlp.recipe("digits_sparse", data=changes).data.root == "/photos"  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_numbers_of_numpy_and_torch_are_numbers(number: object) -> None:
    assert sparse_mlp.recipe("digits_sparse", optim={"lr": number}).optim.lr == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [{1, 2}, b"x", np.zeros(2), object()])
def test_what_no_file_can_hold_is_no_value_of_a_recipe(value: object) -> None:
    with pytest.raises(UserError, match="cannot be a value of a recipe"):
        sparse_mlp.recipe("digits_sparse", model={"args": {"act_layer": value}})


@pytest.mark.parametrize("name", [None, 3, Path("digits_sparse"), ["digits_sparse"]])
def test_a_recipe_has_a_name(name: object) -> None:
    with pytest.raises(UserError, match="called by its name"):
        sparse_mlp.recipe(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["digits_sparse", None, {"name": "digits_sparse"}])
def test_only_a_recipe_is_trained(recipe: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train takes a recipe"):
        sparse_mlp.train(recipe, tmp_path / "run")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("datasets", [3, (Stripes(4),), Stripes(4), {"train": Stripes(4)}])
def test_datasets_are_two(recipe: sparse_mlp.jobs.Recipe, tmp_path: Path, datasets: object) -> None:
    with pytest.raises(UserError, match="a training and a test set"):
        sparse_mlp.train(recipe, tmp_path / "run", datasets=datasets)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_model_is_fitted_to_datasets_of_ones_own(tmp_path: Path) -> None:
    sets = (Stripes(64), Stripes(20))
    recipe = sparse_mlp.recipe("resnet10t", datasets=sets, data={"workers": 0}, train={"steps": 2})
    assert recipe.data.name == "own" and recipe.data.batch_size == 8  # type: ignore[attr-defined]
    assert (recipe.data.channels, recipe.augment.flip) == (1, 0)  # type: ignore[attr-defined]
    run = sparse_mlp.train(recipe, tmp_path / "run", datasets=sets, show=False)
    assert run.metrics["images"] == 20
    probe = sparse_mlp.recipe("linear_probe", datasets=sets, model={"weights": run.path})
    assert (probe.data.name, probe.data.batch_size) == ("own", 8)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="a training and a test set"):
        sparse_mlp.recipe("resnet10t", datasets=Stripes(4))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="would be ignored: the images come from datasets of your own"):
        sparse_mlp.recipe("resnet10t", datasets=sets, data={"root": tmp_path})


@pytest.mark.parametrize("name", ["linear_probe", "finetune", "knn"])
def test_a_folder_in_place_of_images_that_lie_in_none(run: sparse_mlp.Run, name: str, tmp_path: Path) -> None:
    """A root is enough: neither the digits nor datasets of one's own have one."""
    for i in range(8):
        image, label = Stripes(8)[i]
        (tmp_path / "photos" / Stripes.classes[label]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / Stripes.classes[label] / f"{i}.png")
    digits = sparse_mlp.recipe("digits_mixer", model={"args": {"num_blocks": 1, "embed_dim": 16}}, train={"steps": 1})
    for source in (run, sparse_mlp.train(digits, tmp_path / "run", show=False)):
        found = sparse_mlp.recipe(name, model={"weights": source.path}, data={"root": tmp_path / "photos"})
        assert (found.data.name, found.data.root) == ("folder", str(tmp_path / "photos"))  # type: ignore[attr-defined]


def test_changes_of_a_resumed_run_are_fields(run: sparse_mlp.Run) -> None:
    with pytest.raises(UserError, match="dictionary of fields"):
        sparse_mlp.resume(run.path, "longer")  # type: ignore[arg-type]


def test_weights_to_evaluate_are_named_by_text_too(tmp_path: Path) -> None:
    recipe = sparse_mlp.recipe("digits_sparse", model=TINY, train={"steps": 2})
    run = sparse_mlp.train(recipe, tmp_path / "run", show=False)
    weights = str(run.path / "model.safetensors")
    assert run.evaluate(checkpoint=weights, device=torch.device("cpu")) == run.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chekpoint": "x"}, "unknown field chekpoint; nearest: checkpoint"),
        ({"data": {"rot": "x"}}, "unknown field data.rot; nearest: data.root"),
        ({"device": 3}, "device is 3"),
    ],
)
def test_wrong_options_of_an_evaluation(run: sparse_mlp.Run, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.evaluate(**options)


def test_wrong_things_to_predict(run: sparse_mlp.Run) -> None:
    with pytest.raises(UserError, match="takes the names of files"):
        run.predict()
    with pytest.raises(UserError, match=r"takes the names of files or folders, not ndarray$"):
        run.predict(np.zeros((8, 8)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown field tops; nearest: top"):
        run.predict("x.png", tops=3)
