"""The driver of the headline experiment on a small stand-in: three parts, two models, one second a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_mlp import recipes
from sparse_mlp.cli import headline
from sparse_mlp.engine import ScheduleConfig, TrainConfig
from sparse_mlp.recipes import ModelConfig
from sparse_mlp.recipes.headline import PARTS, NamedRun
from sparse_mlp.recipes.pretrain import get_pretraining, resolve
from sparse_mlp.tasks import ClassifyConfig

Run = Callable[..., tuple[int, str, str]]

_ARGS = {"num_blocks": 2, "embed_dim": 16, "patch_size": 4}
MODELS = {
    "sparse": ModelConfig("sparse_mlp_t4_32", {**_ARGS, "sparse_blocks": 1}),
    "mixer": ModelConfig("mixer_t4_32", _ARGS),
}


def small_runs(parts: tuple[str, ...] = PARTS, seeds: int = 2) -> Iterator[NamedRun]:
    train = TrainConfig(steps=6, log_every=2, eval_every=3, save_every=2)
    digits = replace(recipes.get("digits_sparse"), train=train, schedule=ScheduleConfig())
    moco = resolve(replace(get_pretraining("digits_moco_sparse"), train=train, schedule=ScheduleConfig()))
    moco = replace(moco, task=replace(moco.task, hidden_dim=16, out_dim=8, knn_images=100))
    probe = replace(digits, task=ClassifyConfig(frozen=True))
    for part in (part for part in ("supervised", "pretrain", "linear") if part in parts):
        for seed in range(seeds):
            for arm, model in MODELS.items():
                base = {"supervised": digits, "pretrain": moco, "linear": probe}[part]
                recipe = replace(base, model=model, train=replace(train, seed=seed))
                yield NamedRun(part, arm, recipe, f"pretrain/{arm}/seed{seed}" if part == "linear" else None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "headline_runs", small_runs)


@pytest.mark.slow  # twelve runs with their reports: about 20 s
def test_what_is_missing_is_run_and_tabled(run: Run, small: None, tmp_path: Path):
    study = tmp_path / "study"
    code, _, err = run("headline", "run", "supervised", "pretrain", "linear", "--seeds", "2", "--out", study)
    assert code == 0, err
    assert {path.parent.relative_to(study).as_posix() for path in study.rglob("predictions.npz")} == {
        entry.name for entry in small_runs()
    }
    weights = recipes.load(study / "linear/sparse/seed1").model.weights
    assert weights == str((study / "pretrain/sparse/seed1").resolve())

    # Killed between two checkpoints: goes on, and ends with the same weights.
    cut = study / "supervised/sparse/seed0"
    before, finished = (cut / "model.safetensors").read_bytes(), (study / "supervised/mixer/seed0/metrics.jsonl").stat()
    (cut / "predictions.npz").unlink()
    (cut / "checkpoints/step_00000006").rename(tmp_path / "lost")
    code, _, err = run("headline", "run", "supervised", "--seeds", "2", "--out", study)
    assert code == 0 and err.count("finished before") == 3 and "going on" in err
    assert (cut / "model.safetensors").read_bytes() == before
    assert (study / "supervised/mixer/seed0/metrics.jsonl").stat() == finished

    code, out, _ = run("headline", "table", "--out", study, "--to", tmp_path / "docs")
    assert code == 0 and len(out.splitlines()) == 3
    rows = [line.split("|") for line in (tmp_path / "docs/results.md").read_text().splitlines() if "| sparse" in line]
    tops = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    first = [line["top1"] for line in tops if line["kind"] == "eval"][-1]
    second = (study / "supervised/sparse/seed1/metrics.jsonl").read_text().splitlines()
    other = [json.loads(line)["top1"] for line in second if '"eval"' in line][-1]
    assert len(rows) == 3, "supervised, linear and knn"
    assert f"{100 * (first + other) / 2:.2f} ±" in rows[0][6] and rows[0][7].strip() == "2 of 2"
    for part in ("supervised", "pretrain"):
        assert (tmp_path / f"docs/{part}.png").stat().st_size > 10_000


def test_a_run_needs_what_it_begins_with(run: Run, small: None, tmp_path: Path):
    code, _, err = run("headline", "run", "linear", "--out", tmp_path)
    assert code == 2 and "which is not finished: run pretrain first" in err and len(err.splitlines()) == 1
