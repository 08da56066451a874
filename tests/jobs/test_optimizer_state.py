"""Runs that begin with the optimiser's state of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparse_mlp
from sparse_mlp.cli.main import main
from sparse_mlp.engine import RunFolder, last_checkpoint
from sparse_mlp.engine.checkpoint import load_optimizer, load_state
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import Context
from sparse_mlp.jobs.classify import ClassifyJob

SMALL = {"num_blocks": 2, "embed_dim": 16, "mlp_ratio": [0.5, 2.0]}
EXPERTS = {"blocks": 1, "num_experts": 3}


def recipe(steps: int = 4, optim: dict | None = None, **model: Any):
    train = {"steps": steps, "save_every": 2, "log_every": 1}
    return sparse_mlp.recipe("digits_mixer", model={"args": SMALL, **model}, train=train, optim=optim or {})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> sparse_mlp.Run:
    return sparse_mlp.train(recipe(), tmp_path_factory.mktemp("dense") / "run", show=False)


def stored(run: sparse_mlp.Run) -> dict[str, dict[str, Any]]:
    path = last_checkpoint(run.folder.checkpoints)
    assert path is not None
    return load_optimizer(path, load_state(path)["learner"])


def begun(given, folder: Path) -> dict[str, dict[str, Any]]:
    """The state of the optimiser before the first step, by name of the parameter."""
    job = ClassifyJob(given, Context(trusted=True))
    job.prepare(RunFolder(folder / "new"), torch.device("cpu"))
    learner = job.trainer.learner
    return {name: learner.optimizer.state.get(p, {}) for name, p in learner.task.named_parameters()}


def test_each_expert_begins_with_the_moments_of_the_mlp(dense: sparse_mlp.Run, tmp_path: Path) -> None:
    of_dense = stored(dense)
    state = begun(recipe(weights=str(dense.path), optimizer_state=True, experts=EXPERTS), tmp_path)
    for mlp in ("model.blocks.1.mlp_tokens", "model.blocks.1.mlp_channels"):
        for layer in ("fc1", "fc2"):
            for moment in ("exp_avg", "exp_avg_sq"):
                weight, bias = (of_dense[f"{mlp}.{layer}.{leaf}"][moment] for leaf in ("weight", "bias"))
                assert weight.abs().max() > 0
                for expert in range(3):
                    assert torch.equal(state[f"{mlp}.experts.{layer}.weight"][moment][expert], weight.t())
                    assert torch.equal(state[f"{mlp}.experts.{layer}.bias"][moment][expert], bias)
            assert float(state[f"{mlp}.experts.{layer}.weight"]["step"]) == 4
        assert state[f"{mlp}.router.weight"] == {}
    for name in ("model.stem.proj.weight", "model.blocks.0.mlp_channels.fc1.weight", "model.head.weight"):
        assert all(torch.equal(value, of_dense[name][key]) for key, value in state[name].items()) and state[name]


def test_the_first_step_is_the_next_one_of_the_dense_run_where_nothing_else_changed(tmp_path: Path) -> None:
    """Copies with gates that add up to 1 have the dense model's answers, so that Adam moves the rest of it alike."""
    experts = {**EXPERTS, "top_k": 2, "args": {"balance_weight": 0.0, "noise_std": 0.0}}
    constant = {"sched": "constant", "warmup_steps": None, "warmup_epochs": None}
    settings = {"train": {"steps": 2, "seed": 0}, "schedule": constant, "model": {"args": SMALL}}
    first = sparse_mlp.train(sparse_mlp.recipe("digits_mixer", **settings), tmp_path / "dense", show=False)
    begin = {"weights": str(first.path), "optimizer_state": True}
    weights = {}
    for name, added in (("dense", {}), ("sparse", {"experts": experts})):
        changes = {**settings, "train": {"steps": 1, "seed": 0}, "model": {"args": SMALL, **begin, **added}}
        run = sparse_mlp.train(sparse_mlp.recipe("digits_mixer", **changes), tmp_path / f"next_{name}", show=False)
        weights[name] = load_file(run.folder.weights())
    name = "blocks.0.mlp_channels.fc1.weight"
    torch.testing.assert_close(weights["dense"][name], weights["sparse"][name], rtol=0, atol=1e-6)
    assert (weights["dense"][name] - load_file(first.folder.weights())[name]).abs().max() > 1e-4


@pytest.mark.slow
def test_the_run_goes_on_from_its_own_state(dense: sparse_mlp.Run, tmp_path: Path) -> None:
    given = recipe(weights=str(dense.path), optimizer_state=True, experts=EXPERTS)
    whole = sparse_mlp.train(given, tmp_path / "whole", show=False)
    assert float(stored(whole)["model.blocks.1.mlp_channels.experts.fc1.weight"]["step"]) == 8
    assert float(stored(whole)["model.blocks.1.mlp_channels.router.weight"]["step"]) == 4
    part = sparse_mlp.train(given, tmp_path / "part", show=False)
    for checkpoint in sorted((part.path / "checkpoints").iterdir())[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    resumed = sparse_mlp.resume(part.path, show=False)
    first, second = (load_file(one.folder.weights()) for one in (whole, resumed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_a_dense_run_and_one_of_the_same_experts_give_all_of_theirs(dense: sparse_mlp.Run, tmp_path: Path) -> None:
    state = begun(recipe(weights=str(dense.path), optimizer_state=True), tmp_path)
    assert all(torch.equal(values["exp_avg"], stored(dense)[name]["exp_avg"]) for name, values in state.items())
    sparse = sparse_mlp.train(recipe(experts=EXPERTS), tmp_path / "sparse", show=False)
    state = begun(recipe(weights=str(sparse.path), optimizer_state=True, experts=EXPERTS), tmp_path)
    assert all(torch.equal(values["exp_avg"], stored(sparse)[name]["exp_avg"]) for name, values in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_state": True}, "model.optimizer_state needs a run folder as model.weights, which is not given"),
        ({"experts": {**EXPERTS, "init": "drop"}}, "model.experts.init must be copy or noise, not drop"),
        ({"optim": {"opt": "sgd"}}, "optim.opt 'sgd' cannot begin with the state of"),
    ],
)
def test_what_does_not_fit_is_one_line(dense: sparse_mlp.Run, tmp_path: Path, changes: dict, message: str) -> None:
    weights = {} if "optimizer_state" in changes else {"weights": str(dense.path), "experts": EXPERTS}
    with pytest.raises(UserError) as error:
        sparse_mlp.train(recipe(**{**weights, "optimizer_state": True, **changes}), tmp_path / "run", show=False)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_on_the_command_line(dense: sparse_mlp.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits_mixer", "--model.args", "num_blocks=2", "embed_dim=16", "mlp_ratio=(0.5,2.0)"]
    words += ["--model.weights", str(dense.path), "--model.optimizer-state", "--train.steps", "1"]
    words += ["--model.experts.blocks", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    output = capsys.readouterr()
    assert "the optimiser begins with the state of" in " ".join((output.out + output.err).split())
    file = dense.folder.weights()
    assert main([str(file) if word == str(dense.path) else word for word in words[:-1]] + [str(tmp_path / "no")]) == 2
    assert "needs a run folder as model.weights" in " ".join(capsys.readouterr().err.split())
