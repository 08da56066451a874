"""The README's commands and code are true."""

import re
import shlex
from pathlib import Path

import pytest

from sparse_mlp import recipes
from sparse_mlp.cli.main import COMMANDS, main

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMAND_LINES = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("sparse-mlp ")
]


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(block.replace("sparse_mlp_b16_224", "sparse_mlp_s4_32").replace("print(", "str("), {})


@pytest.mark.parametrize("words", COMMAND_LINES, ids=lambda words: " ".join(words[:2]))
def test_commands_exist(words: list[str]) -> None:
    assert words[0] in COMMANDS
    if words[0] in ("train", "compare"):
        names = [word for word in words[1:] if re.match(r"^\w+_\w+$", word)]
        assert all(name in recipes.RECIPES for name in names)


@pytest.mark.parametrize("words", [words for words in COMMAND_LINES if words[0] in ("recipes", "models", "info")])
def test_those_that_need_no_run_succeed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.slow  # trains, fine-tunes and reports: about 30 s
def test_those_of_a_run_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of_a_run = [words for words in COMMAND_LINES if "runs/digits_sparse" in words and words[0] != "predict"]
    assert {words[0] for words in of_a_run} == {"train", "probe", "finetune", "export-backbone", "eval", "report"}
    short = ["--train.epochs", "1", "--schedule.warmup-epochs", "0"]
    assert main(["train", "digits_sparse", *short]) == 0
    for words in of_a_run:
        assert main([*words, *(short if words[0] == "finetune" else [])]) == 0, words


def test_files_named_exist() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
