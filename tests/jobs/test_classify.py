"""Classes of a run and of other images are matched by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparse_mlp
from sparse_mlp.data import DataConfig
from sparse_mlp.errors import UserError

COLOURS = {"cat": (250, 20, 20), "dog": (20, 250, 20), "fox": (20, 20, 250), "ape": (250, 250, 20)}


def folder(root: Path, *classes: str, count: int = 20) -> Path:
    """Pictures of one colour a class, with some noise."""
    generator = np.random.default_rng(len(classes))
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(COLOURS[name]) + generator.integers(-20, 20, (16, 16, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sparse_mlp.Run:
    root = tmp_path_factory.mktemp("classes")
    recipe = sparse_mlp.recipe(
        "resnet10t", data={"root": str(folder(root / "images", "cat", "dog", "fox"))}, train={"epochs": 5}
    )
    run = sparse_mlp.train(recipe, root / "run", show=False)
    assert run.metrics["top1"] == 1
    return run


def data(run: sparse_mlp.Run, root: Path) -> DataConfig:
    from dataclasses import replace

    return replace(run.recipe.data, root=str(root))  # type: ignore[attr-defined]


def test_classes_in_another_order_are_found_by_name(run: sparse_mlp.Run, tmp_path: Path) -> None:
    """dog and fox are the first and second class of this folder, the second and third of the run."""
    other = folder(tmp_path / "other", "fox", "dog")
    metrics = run.evaluate(data=data(run, other))
    assert metrics["top1"] == 1 and metrics["images"] == 40, "all of them: none was trained on"


def test_classes_that_the_run_does_not_know_are_named(run: sparse_mlp.Run, tmp_path: Path) -> None:
    other = folder(tmp_path / "other", "ape", "cat", "dog")
    with pytest.raises(UserError, match="'ape'"):
        run.evaluate(data=data(run, other))


def test_predicting_a_folder_looks_into_its_subfolders(run: sparse_mlp.Run, tmp_path: Path) -> None:
    other = folder(tmp_path / "other", "fox", "dog", count=3)
    rows = run.predict(other)
    assert [(Path(row["file"]).parent.name, row["class_1"]) for row in rows] == [("dog", "dog")] * 3 + [
        ("fox", "fox")
    ] * 3


def test_a_picture_that_cannot_be_read_has_a_row(run: sparse_mlp.Run, tmp_path: Path) -> None:
    other = folder(tmp_path / "other", "fox", count=2)
    (other / "fox" / "1.png").write_bytes((other / "fox" / "1.png").read_bytes()[:60])
    good, bad = run.predict(other)
    assert good["class_1"] == "fox" and "cannot read image" in bad["error"]


def test_evaluating_needs_no_writable_folder(run: sparse_mlp.Run) -> None:
    paths = [run.path, *run.path.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in paths}
    run.evaluate()
    run.predict(Path(run.recipe.data.root) / "cat")  # type: ignore[attr-defined]
    assert {path: path.stat().st_mtime_ns for path in [run.path, *run.path.rglob("*")]} == before
