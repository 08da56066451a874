"""The study of backbones on CamVid: every model has the same budget, and the table says what was measured."""

from __future__ import annotations

import pytest

from experiments.segmentation.camvid import BUDGET, recipe, table


@pytest.mark.parametrize("model", ["resnet18", "cycle_mlp_b1"])
def test_the_budget_is_one_of_multiply_adds(model):
    one, macs, _ = recipe(model, 1, "camvid")
    spent = one.train.steps * one.data.batch_size * macs
    assert spent == pytest.approx(BUDGET, rel=0.5 / one.train.steps + 1e-9)
    assert one.train.seed == 1 and one.data.root == "camvid" and one.model.name == model


def test_the_table_has_mean_and_spread():
    row = {"macs": 10**9, "parameters": 12_300_000, "steps": 225, "miou": [0.25, 0.27], "pixel_accuracy": [0.7, 0.7]}
    assert table({"resnet18": row}).splitlines()[-1] == ("| resnet18 | 12.3 M | 1.00 G | 225 | 26.0 ± 1.4 | 70.0 |")
