"""Image folders that changed or moved between a run's training and its evaluation."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparse_mlp
from sparse_mlp.errors import UserError
from sparse_mlp.jobs.classify import ClassifyRecipe


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first") / "images"
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(10 * number + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    sparse_mlp.train(_recipe(root), root.parent / "run", show=False)
    return root.parent


def _recipe(root: Path) -> ClassifyRecipe:
    model = {"args": {"num_blocks": 1, "embed_dim": 16, "sparse_blocks": 1, "patch_size": 8}}
    data = {"root": root, "image_size": 16, "batch_size": 8}
    recipe = sparse_mlp.recipe("sparse_mlp_t4_32", model=model, data=data, train={"steps": 3})
    assert isinstance(recipe, ClassifyRecipe)
    return recipe


@pytest.fixture
def trained(first: Path, tmp_path: Path) -> Path:
    """A folder with `images` and the `run` on them."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(str(first), str(tmp_path)))
    return tmp_path


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "sparse_mlp"):
        yield


def test_the_split_stays_when_a_run_is_resumed_while_images_are_gone(trained: Path) -> None:
    split = (trained / "run" / "split.json").read_text()
    gone = trained / "images" / json.loads(split)["test"][0]
    gone.rename(trained / "away.png")
    assert sparse_mlp.resume(trained / "run", show=False).metrics["images"] == 3
    assert (trained / "run" / "split.json").read_text() == split
    (trained / "away.png").rename(gone)
    assert sparse_mlp.Run(trained / "run").evaluate()["images"] == 4


def test_an_evaluation_says_that_test_images_are_gone(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    (trained / "images" / json.loads((trained / "run" / "split.json").read_text())["test"][0]).unlink()
    assert sparse_mlp.Run(trained / "run").evaluate()["images"] == 3
    assert "1 of the 4 test images of the stored split are gone" in caplog.text


def test_a_report_shows_the_pictures_of_its_file_names(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The numbers of the other test images move when one is gone."""
    from sparse_mlp.data import AugmentConfig
    from sparse_mlp.jobs import Context
    from sparse_mlp.jobs.images import open_images, samples

    run = sparse_mlp.Run(trained / "run")
    context = Context(run.folder)

    def drawn() -> dict[int, bytes]:
        found = samples(run.folder, open_images(run.recipe.data, AugmentConfig(), context))  # type: ignore[attr-defined]
        assert found is not None
        return {int(i): image.numpy().tobytes() for i, image in zip(found.index, found.images, strict=True)}

    before = drawn()
    (trained / "images" / json.loads((trained / "run" / "split.json").read_text())["test"][0]).unlink()
    after = drawn()
    assert after.items() <= before.items() and len(after) >= len(before) - 1
    assert run.report().is_file()


def test_a_moved_folder_is_tested_on_the_images_of_the_run(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, before = sparse_mlp.Run(trained / "run"), sparse_mlp.Run(trained / "run").metrics
    (trained / "images").rename(trained / "moved")
    data = run.recipe.data  # type: ignore[attr-defined]
    assert run.evaluate(data={"root": trained / "moved"}) == pytest.approx(before)
    assert "those that it was tested on count" in caplog.text
    assert run.evaluate(data={"root": trained / "moved", "test_share": 1.0})["images"] == 20
    assert data.root == str(trained / "images")


def test_a_share_of_the_runs_own_images_is_refused(trained: Path) -> None:
    with pytest.raises(UserError, match=r"data\.test_share 0\.5 would be ignored"):
        sparse_mlp.Run(trained / "run").evaluate(data={"test_share": 0.5})


def test_images_of_other_classes_do_not_go_on_a_run(trained: Path) -> None:
    (trained / "run" / "split.json").unlink()
    (trained / "images" / "dog").rename(trained / "images" / "ant")
    with pytest.raises(UserError, match="'ant' is new; 'dog' is gone"):
        sparse_mlp.resume(trained / "run", show=False)
    assert json.loads((trained / "run" / "inputs.json").read_text())["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    "content", ["[1]", '{"train": 5, "test": []}', '{"train": ["cat/../../x.png"], "test": []}', "\0", '{"train": []}']
)
def test_a_split_that_is_none(trained: Path, content: str) -> None:
    (trained / "run" / "split.json").write_text(content)
    with pytest.raises(UserError, match=r"split\.json"):
        sparse_mlp.Run(trained / "run").evaluate()


def test_a_folder_that_was_not_begun_keeps_nothing_of_the_first_try(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    out.mkdir()
    for name in ("config.json", "inputs.json", "split.json"):
        shutil.copy(trained / "run" / name, out / name)
    recipe = sparse_mlp.recipe(
        "digits_sparse",
        model={"args": {"num_blocks": 1, "embed_dim": 16, "sparse_blocks": 1, "patch_size": 4}},
        train={"steps": 1},
    )
    assert sparse_mlp.train(recipe, out, show=False).evaluate()["images"] == 599


def test_a_run_on_a_folder_is_evaluated_on_a_named_set(trained: Path) -> None:
    """Its root is not the set's, and says nothing of it."""
    with pytest.raises(UserError, match=r"data\.channels is 3, but the images of digits have 1"):
        sparse_mlp.Run(trained / "run").evaluate(data={"name": "digits"})


def test_a_divided_folder_is_evaluated_by_its_test_part(trained: Path) -> None:
    (trained / "other").mkdir()
    for part in ("train", "val"):
        shutil.copytree(trained / "images", trained / "other" / part)
    assert sparse_mlp.Run(trained / "run").evaluate(data={"root": trained / "other"})["images"] == 20
