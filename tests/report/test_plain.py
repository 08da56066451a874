"""The page of a run of any kind, and the structure that all pages share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.report.pages import Page

from sparse_mlp.report import write_classification_report, write_comparison, write_plain_report
from sparse_mlp.report.nodes import write_node_report
from sparse_mlp.report.pretraining import write_pretraining_report

MakeRun = Callable[..., Path]


def test_a_run_of_an_unknown_kind(make_run: MakeRun) -> None:
    lines = [
        {"kind": "train", "step": 1, "time": 1.0, "loss": 3.0, "[box]_loss": 2.0, "items_per_s": 4.0},
        {"kind": "eval", "step": 1, "time": 1.0, "split": "test", "map50": 0.25, "loss": 1.5, "ema": False},
        {"kind": "eval", "step": 2, "time": 2.0, "split": "test", "map50": 0.5, "loss": 1.0, "ema": False},
    ]
    run = make_run(
        metrics="".join(json.dumps(line) + "\n" for line in lines), predictions=False, config={"kind": "detect"}
    )
    page = Page(write_plain_report(run))
    assert page.sections() == ["last", "curves"]
    assert "Last evaluation map50 0.5 loss 1" in page.text and "map50 0.5 last evaluation" in page.text
    assert "Run report · detect" in page.text and "[box]_loss" in page.source
    assert {path.stem for path in (run / "figures").glob("*.svg")} == {
        "scalar_loss",
        "scalar_map50",
        "scalar__box__loss",
        "scalar_items_per_s",
    }
    assert "predictions.npz" not in page.text


def test_a_run_that_logged_nothing(make_run: MakeRun) -> None:
    page = Page(write_plain_report(make_run(metrics="", predictions=False, weights=False)))
    assert page.sections() == [] and "not finished at step 0" in page.text
    assert "Training time" not in page.text


def write_nodes(run: Path) -> Path:
    with np.load(run / "predictions.npz") as found:
        return write_node_report(run, "mine", 5, 4, found["logits"], dict(found))


@pytest.mark.parametrize(
    "write", [write_classification_report, write_pretraining_report, write_plain_report, write_nodes]
)
def test_every_page_says_what_ran(make_run: MakeRun, write: Callable[[Path], Path]) -> None:
    run = make_run("[b]<run>[red]")
    page = Page(write(run))
    for words in ("sparse-mlp train 'a b'", "0123456789ab", "2026-01-02 03:04:05 UTC", "torch 2.11", "[b]<run>[red]"):
        assert words in page.text
    assert "All settings" in page.text and "finished at step 100" in page.text


def test_a_comparison_says_what_ran(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("[b]<run>[red]"), make_run("b", config={"name": "b"})]
    page = Page(write_comparison(runs, tmp_path / "out"))
    for words in ("sparse-mlp train 'a b'", "0123456789ab", "2026-01-02 03:04:05 UTC", "torch 2.11", "[b]<run>[red]"):
        assert words in page.text
