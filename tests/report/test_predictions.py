"""Predictions as CSV, and the files of what was misclassified."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.report.pages import Page

from sparse_mlp.report import reduce_predictions, write_classification_report, write_predictions_csv

MakeRun = Callable[..., Path]

LOGITS = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], np.float32))


def arrays(**more: object) -> dict[str, np.ndarray]:
    return {"index": np.array([4, 5, 6]), "target": np.array([0, 0, 2]), "logits": LOGITS, **more}  # type: ignore[dict-item]


def lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_csv_with_file_names(tmp_path: Path) -> None:
    files = np.array(['a, "b".png', "[red]x.png", "c\udcff.png"])
    path = write_predictions_csv(tmp_path / "p.csv", arrays(files=files), ["[cat]", "dog, <b>", "fox"])
    assert lines(path) == [
        ["file", "target", "predicted", "probability", "correct"],
        ['a, "b".png', "[cat]", "[cat]", "0.500000", "true"],
        ["[red]x.png", "[cat]", "dog, <b>", "0.800000", "false"],
        ["c\udcff.png", "fox", "fox", "0.600000", "true"],
    ]


def test_csv_without_names_has_the_number_in_the_test_set(tmp_path: Path) -> None:
    found = reduce_predictions(arrays(target=np.array([0, -1, 2])))
    path = write_predictions_csv(tmp_path / "p.csv", found)
    assert lines(path) == [
        ["index", "target", "predicted", "probability", "correct"],
        ["4", "0", "0", "0.500000", "true"],
        ["5", "", "1", "0.800000", ""],
        ["6", "2", "2", "0.600000", "true"],
    ]


def test_csv_of_names_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 classes, but 1 class names"):
        write_predictions_csv(tmp_path / "p.csv", arrays(), ["a"])


def test_the_page_lists_the_files_of_what_was_misclassified(make_run: MakeRun) -> None:
    names = ["x/[bold]1.png", "x/<2>.png", "y/3\udcff.png"]
    run = make_run(classes=["a", "b", "c"], target=np.array([0, 0, 1]), logits=LOGITS, files=names)
    page = Page(write_classification_report(run))
    assert "x/<2>.png a b 0.80 y/3\\udcff.png b c 0.60" in page.text  # the surest first
    assert "1.png" not in page.text
    assert "predictions.csv" not in page.text
    (run / "predictions.csv").touch()
    assert "Every prediction is in predictions.csv" in Page(write_classification_report(run)).text


def test_without_names_the_page_lists_numbers(make_run: MakeRun) -> None:
    run = make_run(classes=["a", "b", "c"], target=np.array([0, 0, 2]), logits=LOGITS)
    assert "#1 a b 0.80" in Page(write_classification_report(run)).text


def test_many_mistakes_are_listed_in_part(make_run: MakeRun) -> None:
    run = make_run(classes=["a", "b"], images=300, target=np.zeros(300, int), logits=np.tile([0, 1.0], (300, 1)))
    assert "The 200 surest of 300." in Page(write_classification_report(run)).text
