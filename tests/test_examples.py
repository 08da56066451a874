"""Every example runs as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.torchrun import finished, torchrun

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow  # a process each, two of them train: about a minute
@pytest.mark.parametrize("program", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(program: Path, tmp_path: Path) -> None:
    # One thread, as in all tests: the suite runs in as many processes as there are cores.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
def test_a_loop_on_two_processes_is_that_of_one() -> None:
    program = next(path for path in EXAMPLES if path.stem == "many_processes")
    printed = [finished(torchrun(program, ranks=ranks))[0] for ranks in (1, 2)]
    assert printed[0].count("loss") == 4
    assert printed[0] == printed[1]


def test_examples_are_short() -> None:
    assert len(EXAMPLES) == 6
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)
