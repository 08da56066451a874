"""The page of a run: complete in itself, well formed, escaped, and with the right numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
from tests.report.pages import Page
from torch import nn

from sparse_mlp import report
from sparse_mlp.report import Samples, wanted_images, write_classification_report
from sparse_mlp.report.analysis import class_accuracy
from sparse_mlp.report.classes import class_accuracy_figure, confusion_figure
from sparse_mlp.report.curves import smooth, thin
from sparse_mlp.report.loads import load_figure
from sparse_mlp.report.run import read_run

MakeRun = Callable[..., Path]
MakeSamples = Callable[..., Samples]


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> Page:
    return Page(whole_run / "report.html")


def test_a_whole_report(whole: Page, whole_run: Path) -> None:
    assert whole.sections() == ["curves", "classes", "load", "explore", "patches", "channels"]
    top1 = read_run(whole_run).top1
    for words in (
        f"Top-1 accuracy {100 * top1:.2f} % of 200 test images",
        "Parameters 17",
        "Multiply-adds 16.0 M per image",
        "Training speed 1,055 images/s",
        "Training time 5.0 s",
        "sparse-mlp train 'a b'",
        "0123456789ab with local changes",
        "2026-01-02 03:04:05 UTC",
        "A CPU, 2 cores, 2 threads, 7.8 GiB",
        "finished at step 100",
    ):
        assert words in whole.text
    figures = {path.stem for path in (whole_run / "figures").iterdir()}
    assert figures >= {"loss", "accuracy", "confusion_matrix", "routing_patches", "load_blocks_4_mlp_tokens"}
    for path in (whole_run / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".svg").read_text().startswith("<?xml")


def test_the_page_is_complete_in_itself(whole: Page) -> None:
    assert "http" not in whole.source
    for tag, attrs in whole.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert tag != "script" or attrs in ({}, {"type": "application/json", "id": "routing-data"})
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"fetch|XMLHttpRequest|WebSocket|import|eval|innerHTML", whole.scripts[-1])
    assert not re.search(r"url\((?![#$])|@import", whole.source)


def test_ids_are_unique_and_links_lead_somewhere(whole: Page) -> None:
    ids = [attrs["id"] for _, attrs in whole.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"].removeprefix("#") for tag, attrs in whole.tags if tag == "a" and attrs["href"]}
    assert targets == set(whole.sections())
    assert all(attrs.get("alt") for tag, attrs in whole.tags if tag == "img")


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "--><b>",
    "$\\frac{$",
    "a & b",
    "",
    "[red]名前[/]",
]


def test_names_are_text_wherever_they_come_from(make_run: MakeRun, make_samples: MakeSamples) -> None:
    layer = "<script>.mlp_tokens"
    run = make_run("<i>[b]run&", classes=HOSTILE, layers={layer: 4})
    for name in ("config.json", "environment.json"):
        text = (run / name).read_text()
        text = text.replace("sparse_mlp_t4_32", "<script>m").replace("A CPU", "<script>c").replace("a b", "<script>r")
        (run / name).write_text(text)
    model = timm.create_model("sparse_mlp_t4_32", num_classes=7, in_chans=1, img_size=8, patch_size=2)
    page = Page(write_classification_report(run, model, make_samples(run)))
    tags = {tag for tag, _ in page.tags}
    assert "b" not in tags and len(page.scripts) == sum(tag == "script" for tag, _ in page.tags) == 2
    assert "<" not in page.scripts[0] and json.loads(page.scripts[0])["images"]
    assert all(attrs.get("src", "").startswith("data:") for tag, attrs in page.tags if tag == "img")
    for words in (
        "<script>m",
        "<script>c",
        "<script>r",
        layer,
        "<i>[b]run&",
        *filter(None, HOSTILE[:3]),
        "a & b",
        "[red]名前[/]",
    ):
        assert words in page.text
    assert {path.suffix for path in (run / "figures").iterdir()} == {".png", ".svg"}


def test_a_dense_run_has_no_experts(make_run: MakeRun, make_samples: MakeSamples) -> None:
    run = make_run(layers={})
    dense = timm.create_model("mixer_t4_32", num_classes=10, in_chans=1, img_size=8, patch_size=2)
    page = Page(write_classification_report(run, dense, make_samples(run)))
    assert page.sections() == ["curves", "classes"]
    assert "expert" not in page.text.lower()


def test_an_interrupted_run_says_so(make_run: MakeRun) -> None:
    run = make_run(predictions=False, weights=False)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text) // 2])
    page = Page(write_classification_report(run))
    assert page.sections() == ["curves", "load"]
    assert "not finished at step" in page.text
    assert "cut short by an interruption" in page.text
    assert "no final evaluation yet" in page.text


@pytest.mark.parametrize("metrics", ["", '{"kind": "event", "step": 0, "time": 0.0, "what": "stopped"}\n'])
def test_a_run_that_logged_nothing_has_a_page(make_run: MakeRun, metrics: str) -> None:
    page = Page(write_classification_report(make_run(metrics=metrics, predictions=False, weights=False)))
    assert page.sections() == []
    assert "at step 0" in page.text


def test_a_single_line_of_each_kind_is_enough(make_run: MakeRun) -> None:
    page = Page(write_classification_report(make_run(steps=1, every=1, evals=1, images=1)))
    assert page.sections() == ["curves", "classes", "load"]


def test_no_evaluations(make_run: MakeRun) -> None:
    page = Page(write_classification_report(make_run(evals=0, predictions=False)))
    assert "Top-1" not in page.text


def test_a_resumed_run_says_how_often(make_run: MakeRun) -> None:
    run = make_run()
    event = '{"kind": "event", "step": 50, "epoch": 5.0, "time": 2.5, "what": "resumed"}\n'
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + event + event)
    assert "resumed 2 times" in Page(write_classification_report(run)).text


def test_one_class(make_run: MakeRun) -> None:
    page = Page(write_classification_report(make_run(classes=["only"])))
    assert "100.00 %" in page.text and "0 of 200 test images are taken for something else" in page.text


def test_a_thousand_classes_show_the_worst(make_run: MakeRun, make_samples: MakeSamples) -> None:
    run = make_run(classes=[f"class number {c}" for c in range(1000)], images=5000)
    page = Page(write_classification_report(run, samples=make_samples(run, number=200)))
    assert "Only the 20 classes in the most frequent mistakes" in page.text
    assert "the 25 worst of" in page.text
    assert len(page.source) < 1_000_000


def test_many_experts_become_a_heat_map(make_run: MakeRun) -> None:
    run = make_run(layers={"blocks.1.mlp_tokens": 32})
    assert "Each row is an expert" in Page(write_classification_report(run)).text
    (axes,) = load_figure(read_run(run).routing["blocks.1.mlp_tokens"], "Load").axes
    assert axes.images[0].get_array().shape == (32, 10)


def test_the_confusion_figure_writes_the_counts() -> None:
    figure = confusion_figure(np.array([[5, 2, 0], [0, 7, 1], [0, 0, 9]]), ["a", "b", "c"])
    (axes,) = figure.axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "5", (1, 0): "2", (1, 1): "7", (2, 1): "1", (2, 2): "9"}  # x is the answer
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_the_accuracy_figure_sorts_the_classes() -> None:
    confusion = np.array([[1, 3, 0], [0, 4, 0], [2, 0, 2]])
    (axes,) = class_accuracy_figure(class_accuracy(confusion), ["low", "best", "middle"], 0.6).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["best", "middle", "low"]
    assert [text.get_text() for text in axes.texts] == ["100.0 %", "50.0 %", "25.0 %"]


def test_the_areas_of_the_load_fill_the_whole(make_run: MakeRun) -> None:
    routing = read_run(make_run(steps=2000, every=2)).routing["blocks.4.mlp_tokens"]
    (axes,) = load_figure(routing, "Load").axes
    assert len(axes.collections) == 8
    below = np.zeros(300)
    for expert, area in enumerate(axes.collections):
        vertices = area.get_paths()[0].vertices
        edges = {x: sorted(vertices[vertices[:, 0] == x, 1]) for x in np.unique(vertices[:, 0])}
        low, high = (np.array([ys[i] for ys in edges.values()]) for i in (0, -1))
        np.testing.assert_allclose(low, below, atol=1e-12)
        np.testing.assert_allclose(high - low, thin(routing.load)[:, expert], atol=1e-12)
        below = high
    np.testing.assert_allclose(below, 1)


def test_thin_and_smooth_keep_means() -> None:
    values = np.arange(1000.0)
    found = thin(values, 10)
    np.testing.assert_allclose(found, values.reshape(10, 100).mean(1))
    assert thin(values, 1000) is values
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 6.0, np.nan, 9.0]), 3), [1.5, 3, 4.5, 7.5, 9])
    rough = np.random.default_rng(0).normal(size=50)
    naive = [rough[max(0, i - 2) : i + 3].mean() for i in range(50)]
    np.testing.assert_allclose(smooth(rough, 4), naive)


def test_class_names_that_do_not_fit_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="predictions of 10 classes, but 2 class names"):
        write_classification_report(make_run(), classes=["a", "b"])


def test_wanted_images_are_enough_and_no_library_complains(
    make_run: MakeRun, make_samples: MakeSamples, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    wanted = wanted_images(run, seed=5)
    assert len(wanted) == len(set(wanted)) and wanted == wanted_images(run, seed=5)
    every = make_samples(run)
    few = Samples(every.images[wanted], every.targets[wanted], every.index[wanted], every.mean, every.std)
    first = write_classification_report(run, model, every, seed=5).read_text()
    assert write_classification_report(run, model, few, seed=5).read_text() == first
    assert caplog.records == []


def test_wanted_images_of_a_stream_or_an_unfinished_run(make_run: MakeRun) -> None:
    assert wanted_images(make_run("a", predictions=False)) == []
    run = make_run("b")
    with np.load(run / "predictions.npz") as archive:
        arrays = dict(archive)
    np.savez(run / "predictions.npz", **(arrays | {"index": np.full(200, -1)}))
    assert wanted_images(run) == []


def test_written_again_it_is_the_same_and_keeps_no_rest(make_run: MakeRun) -> None:
    run = make_run(layers={})
    first = write_classification_report(run).read_bytes()
    assert write_classification_report(run).read_bytes() == first
    assert not list(run.glob(".*"))


def test_nothing_of_pyplot_is_imported() -> None:
    for path in Path(report.__file__).parent.glob("*.py"):
        assert not re.search(r"^ *(from|import) .*pyplot", path.read_text(), re.M), path
