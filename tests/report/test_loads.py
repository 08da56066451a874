"""Load of the experts: what training measured, or else what the routers do with test images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from tests.report.pages import Page
from torch import nn

from sparse_mlp.moe import telemetry
from sparse_mlp.report import Samples, read_run, write_classification_report
from sparse_mlp.report.loads import layers_figure, loads_over_time_figure, router_figure
from sparse_mlp.report.routing import measure_load

MakeRun = Callable[..., Path]
LAYERS = {f"blocks.{b}.mlp_{kind}": 8 if kind == "tokens" else 4 for b in range(4) for kind in ("tokens", "channels")}


def freeze(run: Path) -> None:
    """Make the run one of a frozen backbone: its meters were never written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "routing":
            line |= {"load": [0.0] * len(line["load"]), "importance": [0.0] * len(line["load"]), "entropy": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_frozen_backbone_is_measured_on_test_images(
    make_run: MakeRun, make_samples: Callable[..., Samples], model: nn.Module
) -> None:
    run = make_run()
    freeze(run)
    samples = make_samples(run, number=20)
    page = Page(write_classification_report(run, model, samples))
    loads = measure_load(model, samples.images)
    busiest = max(float(found.load.max()) * len(found.load) for found in loads.values())
    assert f"{busiest:.2f}" in page.text and "Busiest expert 0.00" not in page.text
    assert "on test images" in page.text and "20 of the test images" in page.text
    assert not list((run / "figures").glob("router_*"))


def test_without_a_model_a_frozen_backbone_has_no_load(make_run: MakeRun) -> None:
    run = make_run()
    freeze(run)
    page = Page(write_classification_report(run))
    assert "load" not in page.sections() and "expert" not in page.text.lower() and "Busiest" not in page.text
    assert not list((run / "figures").glob("*balance*"))


def test_measured_loads_are_those_of_one_forward() -> None:
    torch.manual_seed(0)
    model = timm.create_model("sparse_mlp_t4_32", num_classes=3, in_chans=1, img_size=8, patch_size=2).train()
    model.blocks[0].eval()
    images = torch.randn(5, 1, 8, 8)
    found = measure_load(model, images, batch_size=2)
    assert model.training and not model.blocks[0].training
    with telemetry.record(model.eval()) as records, torch.no_grad():
        model(images)
    assert list(found) == list(records)
    for name, (record,) in records.items():
        counts = np.bincount(record.experts.flatten().numpy(), minlength=len(found[name].load))
        np.testing.assert_allclose(found[name].load, counts / counts.sum())
        assert found[name].dropped == 1 - record.kept.float().mean()
    dense = timm.create_model("mixer_t4_32", num_classes=3, in_chans=1, img_size=8, patch_size=2)
    assert measure_load(dense, images) == {}


def test_eight_layers_share_one_map_and_a_table(make_run: MakeRun) -> None:
    run = make_run(layers=LAYERS)
    page = Page(write_classification_report(run))
    drawn = {path.stem for path in (run / "figures").glob("*.png")}
    assert {"load_layers", "load_over_time"} <= drawn
    assert not [name for name in drawn if "blocks" in name]
    assert all(name in page.text for name in LAYERS)
    assert "blocks.0.mlp_tokens token mixing 8" in page.text


def test_the_map_of_all_layers_shows_loads_over_the_fair_share() -> None:
    axes = layers_figure({"a": np.array([0.5, 0.3, 0.2, 0.0]), "b": np.array([0.75, 0.25])}).axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[2, 1.2, 0.8, 0], [1.5, 0.5, np.nan, np.nan]])
    assert [text.get_text() for text in axes.texts] == ["2.00", "1.20", "0.80", "0.00", "1.50", "0.50"]


def test_the_map_over_time_has_a_row_for_every_expert(make_run: MakeRun) -> None:
    layers = read_run(make_run(layers=LAYERS)).routing
    axes = loads_over_time_figure(layers).axes[0]
    shown = axes.images[0].get_array()
    assert shown.shape == (4 * 8 + 4 * 4, 10)
    np.testing.assert_allclose(shown[:8], 8 * layers["blocks.0.mlp_tokens"].load.T)
    np.testing.assert_allclose(shown[-4:], 4 * layers["blocks.3.mlp_channels"].load.T)


def test_the_legend_covers_nothing_that_is_drawn(make_run: MakeRun) -> None:
    figure = router_figure(read_run(make_run()).routing["blocks.4.mlp_tokens"])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1
