"""The program of the experiment on a small stand-in: four parts, two models, one second a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.headline import __main__ as headline
from experiments.headline.arms import PARTS
from experiments.runs import NamedRun
from sparse_mlp import recipes
from sparse_mlp.engine import ScheduleConfig, TrainConfig
from sparse_mlp.jobs import ModelConfig, Run
from sparse_mlp.jobs.knn import KnnRecipe
from sparse_mlp.tasks.classify import ClassifyConfig

_ARGS = {"num_blocks": 2, "embed_dim": 16, "patch_size": 4}
MODELS = {
    "sparse": ModelConfig("sparse_mlp_t4_32", {**_ARGS, "sparse_blocks": 1}),
    "mixer": ModelConfig("mixer_t4_32", _ARGS),
}


def small_runs(parts: tuple[str, ...] = PARTS, seeds: int = 2) -> Iterator[NamedRun]:
    train = TrainConfig(steps=6, log_every=2, eval_every=3, save_every=2)
    digits = replace(recipes.get("digits_sparse"), train=train, schedule=ScheduleConfig())
    moco = replace(recipes.get("digits_moco_sparse"), train=train, schedule=ScheduleConfig())
    moco = replace(moco, task=replace(moco.task, hidden_dim=16, out_dim=8, knn_images=100))
    probe = replace(digits, task=ClassifyConfig(frozen=True))
    knn = KnnRecipe(data=digits.data)
    bases = {"supervised": digits, "pretrain": moco, "linear": probe, "knn": knn}
    for part in (part for part in bases if part in parts):
        for seed in range(seeds):
            for arm, model in MODELS.items():
                recipe = replace(bases[part], model=model)
                if part != "knn":
                    recipe = replace(recipe, train=replace(train, seed=seed))
                source = f"pretrain/{arm}/seed{seed}" if part in ("linear", "knn") else None
                yield NamedRun(part, arm, seed, recipe, source)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "headline_runs", small_runs)


def run(*arguments: object) -> int:
    return headline.main([str(argument) for argument in arguments])


@pytest.mark.slow  # sixteen runs with their reports: about 20 s
def test_what_is_missing_is_run_and_tabled(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = tmp_path / "study"
    assert run("run", "supervised", "pretrain", "linear", "knn", "--seeds", 2, "--out", study) == 0
    assert {path.parent.relative_to(study).as_posix() for path in study.rglob("results.json")} == {
        entry.name for entry in small_runs()
    }
    assert Run(study / "linear/sparse/seed1").recipe.model.weights == str((study / "pretrain/sparse/seed1").resolve())

    # Killed between two checkpoints: goes on, and ends with the same weights.
    killed = study / "supervised/sparse/seed0"
    before = (killed / "model.safetensors").read_bytes()
    finished = (study / "supervised/mixer/seed0/metrics.jsonl").stat()
    (killed / "results.json").unlink()
    (killed / "checkpoints/step_00000006").rename(tmp_path / "lost")
    capsys.readouterr()
    assert run("run", "supervised", "--seeds", 2, "--out", study) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 3 and out.count("going on") == 1
    assert (killed / "model.safetensors").read_bytes() == before
    assert (study / "supervised/mixer/seed0/metrics.jsonl").stat() == finished

    assert run("report", "--out", study, "--to", tmp_path / "docs") == 0, capsys.readouterr().err
    assert len(capsys.readouterr().out.splitlines()) == 4
    results = json.loads((tmp_path / "docs/results.json").read_text())
    expected = [Run(study / f"supervised/sparse/seed{seed}").metrics["top1"] for seed in range(2)]
    assert results["supervised"]["sparse"]["top1"] == pytest.approx(expected)
    assert results["knn"]["mixer"]["steps"] == 0, "neighbours need no training"
    assert results["knn"]["mixer"]["training_macs"] == pytest.approx(results["pretrain"]["mixer"]["training_macs"])
    rows = [line.split("|") for line in (tmp_path / "docs/results.md").read_text().splitlines() if "| sparse" in line]
    assert len(rows) == 3, "supervised, linear and knn"
    assert f"{50 * sum(expected):.2f} ±" in rows[0][6] and rows[0][7].strip() == "2 of 2"
    for part in ("supervised", "pretrain"):
        assert (tmp_path / f"docs/{part}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "linear"), "which is not finished: run pretrain first"),
        (("run", "supervisd"), "unknown part 'supervisd'"),
        (("run", "--seeds", "0"), "seeds must be at least 1, got 0"),
        (("report",), "there is no finished run of the headline experiment in"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(*arguments, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
