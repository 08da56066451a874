"""Any timm model on a folder of photos, in one line."""

from __future__ import annotations

import csv
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import sparse_mlp
from sparse_mlp import recipes
from sparse_mlp.cli.main import main
from sparse_mlp.errors import UserError

ODD_NAMES = ("Chat & chien [1]", "été 2024", "-minus", "a b  c", "日本")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 pictures in 5 classes with odd names, each class a colour, of differing sizes; and what is no picture."""
    root = tmp_path_factory.mktemp("own") / "my photos"
    generator = np.random.default_rng(0)
    for number, name in enumerate(ODD_NAMES):
        (root / name).mkdir(parents=True)
        for i in range(54):
            height, width = generator.integers(40, 90, 2)
            pixels = generator.integers(0, 120, (height, width, 3), dtype=np.uint8)
            pixels[..., number % 3] += np.uint8(60 + 20 * number)
            Image.fromarray(pixels).save(root / name / f"photo [{i}] ü.jpg")
    (root / ".DS_Store").write_text("x")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "a b  c" / "notes.txt").write_text("x")
    return root


def test_one_line_trains_measures_and_names_what_it_got_wrong(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "resnet10t", "--data.root", str(photos), "--train.epochs", "2", "--out", str(out)]) == 0
    err = capsys.readouterr().err
    assert "215 training images, 5 classes" in err and "top-1" in err and "report" in err
    assert err.count("2 hidden (leading dot)") == 1
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 55 and all((photos / row["file"]).is_file() for row in rows)
    wrong = sum(row["correct"] == "false" for row in rows)
    assert 1 - wrong / 55 == pytest.approx(sparse_mlp.Run(out).metrics["top1"])
    assert (out / "report.html").is_file()
    split = json.loads((out / "split.json").read_text())
    assert len(split["train"]) == 215 and {row["file"] for row in rows} == set(split["test"])
    (row, *_) = sparse_mlp.Run(out).predict(photos / "-minus")
    assert row["class_1"] in ODD_NAMES


def test_images_that_came_later_are_neither_trained_nor_tested_on(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "grown"
    for path in sorted(photos.glob("*/*.jpg")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    run = sparse_mlp.train(
        recipes.recipe("resnet10t", data={"root": str(root)}, train={"epochs": 1}), tmp_path / "run", show=False
    )
    before = run.evaluate()
    for number in range(20):
        Image.new("RGB", (50, 50), (255, 0, 0)).save(root / "-minus" / f"0 new {number}.png")
    assert run.evaluate() == before == pytest.approx(run.metrics)


def test_settings_fit_the_images(photos: Path) -> None:
    recipe = recipes.recipe("resnet10t", data={"root": str(photos)})
    assert recipe.data.name == "folder" and recipe.data.batch_size == 8 and recipe.data.channels == 3
    assert recipe.data.image_size == 64, "the photos are some sixty pixels wide"
    assert recipe.train.epochs is not None and recipe.schedule.warmup_epochs == recipe.train.epochs / 10
    digits = recipes.recipe("resnet10t", data={"name": "digits"})
    assert digits.augment.flip == 0 and digits.data.batch_size == 64


@pytest.mark.parametrize(
    ("train", "shown", "warmup"),
    [
        ({"epochs": 2}, "batch 16, 2 epochs", 0.2),
        ({"steps": 27}, "batch 16, 27 steps", 0.1),
        ({"minutes": 1}, "1 minutes", 7),
    ],
)
def test_what_is_printed_is_what_is_trained(
    photos: Path, caplog: pytest.LogCaptureFixture, train: dict, shown: str, warmup: float
) -> None:
    with caplog.at_level("INFO", "sparse_mlp"):
        recipe = recipes.recipe("resnet10t", data={"root": str(photos), "batch_size": 16}, train=train)
    assert shown in caplog.text
    assert recipe.schedule.warmup_epochs == pytest.approx(warmup, rel=0.05)


def test_two_images_a_class_are_enough_to_try(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40)).save(tmp_path / "images" / name / f"{number}.png")
    recipe = recipes.recipe("resnet10t", data={"root": tmp_path / "images"}, train={"steps": 1})
    assert recipe.data.batch_size == 2
    assert sparse_mlp.train(recipe, tmp_path / "run", show=False).metrics["images"] == 3


def test_a_folder_that_is_all_for_the_test(photos: Path) -> None:
    with pytest.raises(UserError, match=r"data\.test_share 1\.0 leaves no image"):
        recipes.recipe("resnet10t", data={"root": str(photos), "test_share": 1.0})


def test_an_image_that_is_too_large_is_named_when_it_is_read(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("1", (20_000, 20_000)).save(tmp_path / name / f"{number}.png")
    assert recipes.recipe("resnet10t", data={"root": str(tmp_path)}).data.image_size == 128


def test_a_users_options_stand(photos: Path) -> None:
    recipe = recipes.recipe("resnet10t", data={"root": str(photos), "image_size": 32}, optim={"lr": 0.5})
    assert (recipe.data.image_size, recipe.optim.lr) == (32, 0.5)


def test_published_weights_are_taken_where_they_are(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From torch's cache of downloads, for there may be no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(timm.create_model("cycle_mlp_b1").state_dict(), tmp_path / "checkpoints" / "CycleMLP_B1.pth")
    recipe = recipes.recipe("cycle_mlp_b1", data={"root": str(photos)})
    assert recipe.model.pretrained and recipe.data.image_size == 224 and recipe.optim.lr < 1e-3


def test_without_them_the_training_starts_from_scratch_and_says_so(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", fail)
    recipe = recipes.recipe("cycle_mlp_b1", data={"root": str(photos)})
    with pytest.raises(UserError, match="weights of cycle_mlp_b1 cannot be fetched here: no network"):
        recipes.recipe("cycle_mlp_b1", data={"root": str(photos)}, model={"pretrained": True})
    assert not recipe.model.pretrained
    assert "cannot be fetched" in caplog.text and "no network" in caplog.text


def test_a_model_without_images_asks_for_them() -> None:
    with pytest.raises(UserError, match="which images"):
        recipes.recipe("resnet10t", train={"epochs": 1})
