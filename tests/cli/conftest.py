from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparse_mlp.cli.main import main

# A model that trains in a second: one dense and one sparse block of width 16 on the 8x8 digits.
TINY = ["--model.args", "num_blocks=2", "embed_dim=16", "sparse_blocks=1", "patch_size=4"]
SHORT = ["--train.steps", "12", "--train.log-every", "6", "--schedule.warmup-epochs", "0.5"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def wide_output() -> Iterator[None]:
    """Room for the long paths of temporary folders, whatever COLUMNS says outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # --help
            code = int(leaving.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny Sparse-MLP on the digits."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits_sparse", *TINY, *SHORT, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def tiny() -> list[str]:
    """Options that make a run tiny."""
    return [*TINY, *SHORT]
