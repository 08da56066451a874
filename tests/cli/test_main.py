from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from sparse_mlp.cli import main as cli
from sparse_mlp.engine import TrainingStopped

Run = Callable[..., tuple[int, str, str]]


def test_the_set_of_commands_is_frozen():
    """Scripts depend on these names: adding one is fine, with a line here; renaming one is not."""
    names = """train pretrain compare probe finetune transfer export-backbone headline eval predict report recipes
        models info nodes convert rebuild-cifar10"""
    assert list(cli.COMMANDS) == names.split()


def test_help_lists_every_command(run: Run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(run: Run, command: str):
    code, out, err = run(command, "--help")
    assert code == 0 and f"sparse-mlp {command}" in out and len(out) > 200 and not err


def test_without_a_command_the_help_is_shown_and_the_code_is_2(run: Run):
    code, out, _ = run()
    assert code == 2 and "commands:" in out


def test_version(run: Run):
    assert run("--version")[:2] == (0, "sparse-mlp 0.1.0\n")


def test_python_dash_m_works():
    done = subprocess.run([sys.executable, "-m", "sparse_mlp", "xyzzy"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparse-mlp: error: unknown command 'xyzzy'; see sparse-mlp --help\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("one\n  two"), 2),
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


def test_our_own_mistakes_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_dispatch", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("train")
