"""The commands and programs in the README and on the site are true."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sparse_mlp import jobs, recipes
from sparse_mlp.cli import parse
from sparse_mlp.cli.compare import CompareOptions
from sparse_mlp.cli.eval import ModelEvalOptions
from sparse_mlp.cli.help import EVAL, TRAIN, VERBS
from sparse_mlp.cli.main import main
from sparse_mlp.cli.predict import OutOptions
from sparse_mlp.cli.train import TrainOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def command_lines(text: str) -> list[list[str]]:
    """The words behind `sparse-mlp` or `-m sparse_mlp`, comments and line continuations taken away."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    found = (re.match(r"\s*(?:sparse-mlp|torchrun .*-m sparse_mlp) (.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


COMMANDS = {
    f"{page.name}: {' '.join(words)}": words
    for page in PAGES
    for block in blocks(page, "console")
    for words in command_lines(block)
} | {
    f"help: {' '.join(words)}": words
    for text in (TRAIN, EVAL)
    for words in command_lines(text)
    if not {"RECIPE", "MODEL", "RUN"} & set(words)
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands_parse(words: list[str]) -> None:
    """The verb, the recipe or model, and the options exist."""
    verb, (names, options) = words[0], parse.split_names(words[1:])
    assert verb in VERBS
    if verb == "train":
        _, options = parse.parse_known(TrainOptions, options, prog=verb)
        default = recipes.get(names[0]) if names else recipes.get("digits_sparse")
        parse.parse(type(default), options, prog=verb, default=default)
    elif verb == "compare":
        _, options = parse.parse_known(CompareOptions, options, prog=verb)
        for name in names:
            if not name.startswith("runs/"):
                recipe = recipes.get(name)
                parse.parse(type(recipe), options, prog=verb, default=recipe)
    elif verb == "eval":
        kind = jobs.job_type("classify").eval_options_type if "/" in names[0] else ModelEvalOptions
        parse.parse(kind, options, prog=verb, default=kind())
        assert "/" in names[0] or timm.is_model(names[0])
    elif verb == "predict":
        assert len(names) >= 2
        parse.parse_known(OutOptions, options, prog=verb)


@pytest.mark.parametrize("words", [["recipes"], ["models"], ["info", "sparse_mlp_b16_224"]])
def test_those_that_need_no_run_succeed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words in COMMANDS.values()
    assert main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.slow  # trains for an epoch or a few steps: about a minute in all
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one namespace a page; the large models by small ones."""
    monkeypatch.chdir(tmp_path)
    if page.name == "new-kind.md":
        pytest.skip("shows the code of tests/jobs/test_toy_kind.py")
    if page.name == "dense.md":
        _write_scenes(tmp_path)
    namespace = {"n": 2, "scaler": torch.amp.GradScaler("cpu"), "path": "missing.pth", "print": lambda *_: None}
    for block in blocks(page, "python"):
        if "pretrained=True)  # fetches" in block or "safetensors.torch" in block:
            continue  # need a network, or a run of minutes
        small = block.replace("sparse_mlp_b16_224", "sparse_mlp_s4_32").replace('"epochs": 20', '"epochs": 1')
        exec(textwrap.dedent(small), namespace)


def _write_scenes(folder: Path) -> None:
    """Images and masks as the page on segmentation has them: scenes/ to train on, new/ to predict."""
    for i in range(4):
        mask = np.random.default_rng(i).integers(0, 2, (3, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        for place in ("scenes/train", "scenes/val", "new"):
            (folder / place / "images").mkdir(parents=True, exist_ok=True)
            (folder / place / "masks").mkdir(exist_ok=True)
            Image.fromarray(255 * mask).convert("RGB").save(folder / place / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / place / "masks" / f"{i}.png")
    (folder / "scenes" / "classes.txt").write_text("dark\nlight\n")


@pytest.mark.slow  # trains, probes and reports: about a minute
def test_the_readmes_commands_on_a_run_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits_sparse", "--train.epochs", "1"]) == 0
    own = [words for words in command_lines("\n".join(blocks(PAGES[0], "console"))) if "runs/digits_sparse" in words]
    assert {words[0] for words in own} == {"train", "eval", "predict", "report", "export"}
    for words in own:
        if words[0] != "predict":
            assert main(words) == 0, words


def test_the_readme_is_short_and_its_files_exist() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 150
    assert text.index("make demo") < text.index("make test") < text.index("##")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (ROOT / target).exists(), target
