from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from sparse_mlp.cli import main as cli
from sparse_mlp.cli.help import VERBS
from sparse_mlp.engine import TrainingStopped
from sparse_mlp.errors import UserError

Run = Callable[..., tuple[int, str, str]]


def test_the_set_of_verbs_is_frozen():
    """Scripts depend on these names: adding one is fine, with a line here; renaming one is not."""
    assert list(VERBS) == [
        "train",
        "eval",
        "predict",
        "report",
        "compare",
        "export",
        "recipes",
        "models",
        "info",
        "convert",
    ]


def test_help_lists_every_verb(run: Run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {name} " in out for name in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_on_two_screens(run: Run, verb: str):
    code, out, err = run(verb, "--help")
    assert code == 0 and f"sparse-mlp {verb}" in out and len(out) > 200 and not err
    assert out.count("\n") <= 80


@pytest.mark.parametrize("verb", ["train", "eval", "compare"])
def test_the_options_that_help_names_exist(run: Run, verb: str):
    """Those of the short help are among those of --help-all."""
    _, short, _ = run(verb, "--help")
    _, full, _ = run(*(["train", "digits_sparse"] if verb == "train" else [verb]), "--help-all")
    shown = set(re.findall(r"--[a-z][\w.-]*", full)) | {
        "--out",
        "--resume",
        "--seeds",
        "--help-all",
        "--nproc-per-node",
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", short))
    assert {name for name in named if name not in shown} == set()


def test_help_of_a_verb_in_the_other_order(run: Run):
    assert run("help", "train") == run("train", "--help") and run("help") == run("--help")


def test_without_a_verb_the_help_is_shown_and_the_code_is_2(run: Run):
    code, out, _ = run()
    assert code == 2 and "verbs:" in out


def test_version(run: Run):
    assert run("--version")[:2] == (0, "sparse-mlp 0.1.0\n")


def test_python_dash_m_works():
    done = subprocess.run([sys.executable, "-m", "sparse_mlp", "xyzzy"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparse-mlp: error: unknown verb 'xyzzy'; see sparse-mlp --help\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("one\n  two"), 2),
        (OSError(28, "No space left on device"), 2),
        (TrainingStopped("saved; go on with --resume x"), 130),
        (TrainingStopped("saved", 15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_a_code(run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    found, out, err = run("train")
    assert (found, out) == (code, "")
    assert err.startswith("sparse-mlp: " if code > 128 else "sparse-mlp: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("ours"), KeyError("ours")])
def test_our_own_mistakes_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(type(error)):
        run("train")


def test_every_error_has_a_traceback_on_request(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSE_MLP_DEBUG", "1")
    with pytest.raises(UserError, match="nearest: digits_sparse"):
        run("train", "digits_sprase")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["compare", "digits_sparse", "-h"]])
def test_help_needs_neither_torch_nor_timm(words: list[str], run: Run):
    """In a process of its own: nothing heavy is imported before the text is there."""
    program = """
import sys, sparse_mlp_command
code = sparse_mlp_command.main()
heavy = [name for name in ("torch", "timm", "numpy") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(*words)[1]
