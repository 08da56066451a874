from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.digits import candidates, folds, seeds
from sparse_mlp import recipes
from sparse_mlp.jobs.classify import ClassifyRecipe


def test_folds_leave_the_test_images_out():
    (images, labels), _, classes = folds.sets.read_digits(Path(), False)
    left_out = []
    for fold in range(folds.FOLDS):
        (train, train_labels), (test, _), names = folds.read_fold(fold, Path(), False)
        assert len(train) + len(test) == len(images) and names == classes
        assert np.bincount(train_labels).min() > 90
        left_out.append(test)
    rows = np.concatenate(left_out).reshape(len(images), -1)
    assert np.array_equal(np.unique(rows, axis=0), np.unique(images.reshape(len(images), -1), axis=0))
    assert len(labels) == 1198


def test_the_choice_has_as_many_candidates_of_each_model():
    assert set(folds.CHOICE) <= set(candidates.CANDIDATES)
    assert sum(name.startswith("sparse") for name in folds.CHOICE) * 2 == len(folds.CHOICE)


@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_every_candidate_is_a_recipe_of_as_many_epochs(name: str):
    recipe = candidates.candidate(name, 10, seed=3)
    assert isinstance(recipe, ClassifyRecipe) and recipe.train.seed == 3
    assert recipe.train.epochs == (20 if name.endswith("twice as long") else 10)


def test_the_plain_candidate_is_the_recipe_of_the_demo():
    recipe = recipes.get("digits_sparse")
    plain = candidates.candidate("sparse, plain, as it is", recipe.train.epochs, seed=recipe.train.seed)
    assert replace(plain, train=recipe.train) == recipe


@pytest.mark.slow  # two short runs
@pytest.mark.parametrize("program", [folds, seeds])
def test_a_short_run_is_tabled(
    program: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    name = "mixer, crops, as it is"
    limits = ["--seeds", "1"] if program is seeds else []
    monkeypatch.setattr(folds, "FOLDS", 2)
    options = ["--epochs", "0.3", "--runs", str(tmp_path), "--json", str(tmp_path / "a.json"), *limits]
    monkeypatch.setattr(sys, "argv", ["program", *options, name])
    program.main()  # type: ignore[attr-defined]
    found = json.loads((tmp_path / "a.json").read_text())["found"][name]
    assert len(found["top1"]) == (1 if program is seeds else 2) and 0 <= min(found["top1"]) <= 1
    assert name in capsys.readouterr().out
