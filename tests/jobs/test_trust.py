"""A run folder is a file from wherever: nothing it names is executed or fetched because somebody looks at it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sparse_mlp
from sparse_mlp.cli.main import main
from sparse_mlp.engine import RunFolder
from sparse_mlp.jobs import to_json

VERBS = ("eval", "report", "resume", "predict", "probe", "knn", "export")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = sparse_mlp.recipe(
        "digits_mixer", model={"args": {"num_blocks": 1, "embed_dim": 16, "patch_size": 4}}, train={"steps": 2}
    )
    return sparse_mlp.train(recipe, tmp_path_factory.mktemp("trust") / "run", show=False).path


@pytest.fixture
def foreign(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run whose configuration somebody has changed."""

    def edit(**sections: dict[str, Any]) -> Path:
        copy = Path(shutil.copytree(trained, tmp_path / "foreign"))
        config = json.loads((copy / "config.json").read_text())
        for name, values in sections.items():
            config[name] |= values
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return edit


def words(verb: str, run: Path, tmp_path: Path) -> list[str]:
    target = str(tmp_path / "out")
    return {
        "eval": ["eval", str(run)],
        "report": ["report", str(run)],
        "resume": ["train", "--resume", str(run)],
        "predict": ["predict", str(run), str(tmp_path)],
        "probe": ["train", "linear_probe", "--model.weights", str(run), "--out", target, "--train.epochs", "1"],
        "knn": ["train", "knn", "--model.weights", str(run), "--out", target],
        "export": ["export", str(run), f"{target}.safetensors"],
    }[verb]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["wds/images", "hfds/images"])
def test_data_that_run_a_command(
    foreign: Callable[..., Path], tmp_path: Path, verb: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "proof"
    run = foreign(data={"name": name, "root": f"pipe:touch {proof}", "num_samples": 10, "num_classes": 10})
    main(words(verb, run, tmp_path))
    assert not proof.exists(), "the command was run"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("model", [{"name": "hf-hub:somebody/model"}, {"name": "local-dir:/no/such/folder"}])
def test_models_that_are_fetched(
    foreign: Callable[..., Path],
    tmp_path: Path,
    verb: str,
    model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import timm

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: asked.append(name))
    assert main(words(verb, foreign(model={**model, "args": {}}), tmp_path)) == 2
    assert not asked
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("verb", ["eval", "predict", "export", "resume"])
@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_backbones_that_are_fetched(
    kind: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a detector or a segmenter, in a run folder from wherever."""
    import timm

    if kind == "detect":
        pytest.importorskip("pycocotools")
    recipe = sparse_mlp.recipe("camvid" if kind == "segment" else "coco_small_retinanet")
    recipe = replace(recipe, model=replace(recipe.model, name="hf-hub:somebody/model", args={}))
    run = RunFolder.create(tmp_path / "foreign", to_json(recipe)).path
    (run / "inputs.json").write_text(json.dumps({"classes": ["one", "two"]}))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: asked.append(name))
    assert main(words(verb, run, pictures)) == 2
    assert not asked
    assert capfd.readouterr().err.count("\n") == 1


def test_a_run_goes_on_without_the_weights_that_it_began_with(trained: Path, tmp_path: Path) -> None:
    """They may be gone, or lie elsewhere."""
    weights = Path(shutil.copy(trained / "model.safetensors", tmp_path / "begin.safetensors"))
    recipe = sparse_mlp.recipe(
        "digits_mixer",
        model={"args": {"num_blocks": 1, "embed_dim": 16, "patch_size": 4}, "weights": str(weights)},
        train={"steps": 4, "save_every": 2, "keep": 9},
    )
    run = sparse_mlp.train(recipe, tmp_path / "run", show=False)
    before = (run.path / "model.safetensors").read_bytes()
    sorted((run.path / "checkpoints").iterdir())[-1].rename(tmp_path / "gone")
    weights.unlink()
    assert (sparse_mlp.resume(run.path, show=False).path / "model.safetensors").read_bytes() == before
