from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.headline.arms import ABLATIONS, CONTESTANTS, PARTS, headline_runs
from sparse_mlp.data import InputSpec
from sparse_mlp.jobs import ModelConfig, build_model

SPEC = InputSpec(tuple("0123456789"), 3, 32, (0.5,) * 3, (0.5,) * 3, 1.0)


def count(config: ModelConfig) -> tuple[int, int]:
    """Multiply-adds of an image, and parameters."""
    model = build_model(config, SPEC).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters())


def test_one_mixer_has_the_multiply_adds_the_other_the_parameters():
    sparse, mixer, wide = (count(CONTESTANTS[name].model) for name in ("sparse", "mixer", "mixer_wide"))
    assert mixer[0] == pytest.approx(sparse[0], rel=0.01)
    assert wide[1] == pytest.approx(sparse[1], rel=0.01)
    assert 5e6 < sparse[0] < 10e6


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("linear", "knn")])  # measures, no budgets
def test_every_run_of_a_part_spends_the_same_multiply_adds(part: str):
    spent = {
        run.arm: run.recipe.train.steps * run.recipe.data.batch_size * count(run.recipe.model)[0]
        for run in headline_runs((part,), seeds=1)
    }
    assert all(value == pytest.approx(spent["sparse"], rel=0.01) for value in spent.values()), spent


def test_runs_differ_in_model_seed_and_steps_only():
    runs = list(headline_runs(("supervised",)))
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in range(3) for arm in CONTESTANTS]
    assert len({run.name for run in headline_runs()}) == len(list(headline_runs()))
    parts = {(run.recipe.data, run.recipe.augment, run.recipe.optim, run.recipe.schedule) for run in runs}
    assert len(parts) == 1


def test_an_ablation_changes_one_thing():
    base = ABLATIONS["sparse"].model.args
    for name, contestant in ABLATIONS.items():
        args = contestant.model.args
        changed = {key for key in args if args[key] != base.get(key)} - {"expert_hidden"}
        assert len(changed) == (0 if name == "sparse" else 1), name


def test_unknown_parts_are_named():
    with pytest.raises(ValueError, match="unknown part 'supervisd'"):
        list(headline_runs(("supervisd",)))


@pytest.mark.parametrize("seeds", [0, -1])
def test_no_seeds_are_no_experiment(seeds: int):
    with pytest.raises(ValueError, match=f"seeds must be at least 1, got {seeds}"):
        list(headline_runs(seeds=seeds))
