"""The upcycling study: equal budgets, a program that goes on where it was stopped, tables of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.runs import NamedRun
from experiments.upcycling import __main__ as program
from experiments.upcycling import tables
from experiments.upcycling.arms import ARMS, SUBJECTS, VARIANTS, multiply_adds, planned_runs
from sparse_mlp import recipes
from sparse_mlp.engine import ScheduleConfig, TrainConfig
from sparse_mlp.moe import MoeMlp


def budget(run: NamedRun) -> float:
    return multiply_adds(run.recipe.model) * run.recipe.train.steps


def test_after_the_seam_all_spend_the_same_and_scratch_the_sum():
    runs = {run.name: run for run in planned_runs()}
    assert len(runs) == 3 * 3 * 4 + len(VARIANTS)
    for subject in SUBJECTS:
        dense, continued, upcycled, scratch = (budget(runs[f"{subject}/{arm}/seed1"]) for arm in ARMS)
        assert upcycled == pytest.approx(continued, rel=1e-3)
        assert scratch == pytest.approx(dense + continued, rel=1e-3)
    for variant in VARIANTS:
        name = variant.replace(" ", "_")
        assert budget(runs[f"mixer/{name}/seed0"]) == pytest.approx(budget(runs["mixer/upcycled/seed0"]), rel=1e-3)


def test_experts_are_counted_by_hand():
    """The Mixer has a second expert in each MLP of two blocks, and routers: 8 experts for 32 channels and 16 tokens."""
    runs = {run.name: run for run in planned_runs()}
    dense, upcycled = (multiply_adds(runs[f"mixer/{arm}/seed0"].recipe.model) for arm in ("dense", "upcycled"))
    channels, tokens = 16 * 2 * 32 * 64 + 16 * 32 * 8, 32 * 2 * 16 * 16 + 32 * 16 * 8
    assert upcycled - dense == 2 * (channels + tokens)


def test_a_yes_is_the_margin_beyond_the_spread():
    assert tables.verdict([0.9]) == "not decided"
    assert tables.verdict([1.0, 1.2]) == "yes"  # 1.1 over 0.5 + 0.14
    assert tables.verdict([0.4, 1.2]) == "no"  # 0.8 under 0.5 + 0.57


def result(top1: float) -> dict:
    costs = {"macs": 10**6, "parameters": 20_000, "steps": 200, "training_macs": 3 * 128 * 200 * 10**6}
    return {"top1": top1, **costs, "curve": {"step": [100, 200], "loss": [1.8, 1.6]}}


def test_tables_leave_out_what_is_not_finished():
    results = {
        "mixer/dense/seed0": result(0.5),
        "mixer/continued/seed0": result(0.52),
        "mixer/upcycled/seed0": result(0.53),
        "mixer/upcycled/seed1": result(0.55),
        "mixer/start_drop/seed0": result(0.51),
    }
    main = tables.main_table(results).splitlines()
    assert main[2] == "| mixer | 50.00 | 52.00 | 54.00 ± 1.41 |  | +1.00 |  | 1 of 3 | not decided |"
    assert main[3] == "| vit |  |  |  |  |  |  | 0 of 3 | not decided |"
    assert tables.cost_table(results).splitlines()[2:] == [
        f"| mixer | `{arm}` | 20 k | 1.00 M | 200 | 0.08 T |" for arm in ("dense", "continued", "upcycled")
    ]
    assert tables.variant_table(results).splitlines()[2:] == [
        "| upcycled | 200 | 53.00 | +0.00 | +1.00 |",
        "| start drop | 200 | 51.00 | -2.00 | -1.00 |",
    ]


def test_experts_are_apart_by_hand():
    layer = MoeMlp(dim=2, hidden_dim=3, num_experts=2)
    with torch.no_grad():
        layer.experts.fc1.weight.copy_(torch.stack([torch.full((2, 3), 1.0), torch.full((2, 3), 3.0)]))
        layer.experts.fc2.weight[1] = layer.experts.fc2.weight[0]
    assert tables.experts_apart(torch.nn.Sequential(layer)) == [0.5, 0.0]  # 1 and 3 are 1 from their mean of 2


def small_runs() -> Iterator[NamedRun]:
    """The Mixer's four arms on digits, six steps each."""
    digits = recipes.get("digits_mixer")
    train = TrainConfig(steps=6, log_every=1, eval_every=0, save_every=0)
    for run in planned_runs():
        if run.part == "mixer" and run.seed == 0 and run.arm in ARMS:
            model = replace(run.recipe.model, args={**run.recipe.model.args, "patch_size": 4})
            recipe = replace(run.recipe, model=model, data=digits.data, augment=digits.augment)
            yield replace(run, recipe=replace(recipe, train=train, schedule=ScheduleConfig()))


@pytest.mark.slow  # four runs with their reports: about 15 s
def test_the_program_trains_what_is_missing_and_reports_it(monkeypatch, tmp_path: Path, capsys):
    def call(*arguments: object) -> int:
        return program.main([str(argument) for argument in (*arguments, "--out", tmp_path / "runs")])

    monkeypatch.setattr(program, "planned_runs", small_runs)
    monkeypatch.setattr(tables, "planned_runs", small_runs)
    assert call("report", "--to", tmp_path) == 2
    assert "no finished run" in capsys.readouterr().err
    assert call("run") == 0
    assert capsys.readouterr().out.count("top-1") == 4
    assert call("run") == 0
    assert capsys.readouterr().out.splitlines() == [f"mixer/{arm}/seed0: finished before" for arm in ARMS]
    assert call("report", "--to", tmp_path) == 0
    runs = json.loads((tmp_path / "results" / "cifar10.json").read_text())["runs"]
    assert set(runs) == {f"mixer/{arm}/seed0" for arm in ARMS}
    assert runs["mixer/upcycled/seed0"]["parameters"] > runs["mixer/continued/seed0"]["parameters"]
    assert runs["mixer/dense/seed0"]["experts_apart"] == []
    assert len(runs["mixer/upcycled/seed0"]["experts_apart"]) == 2 * 4  # two layers in each of four MLPs
    assert len(runs["mixer/dense/seed0"]["curve"]["loss"]) == 1
    assert (tmp_path / "seam.png").stat().st_size < 200_000
