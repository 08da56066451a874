from __future__ import annotations

from pathlib import Path


def test_ranks_with_different_numbers_of_batches(launch):
    errors: list[str] = []
    program = Path(__file__).with_name("uneven_evaluation.py")
    assert launch(program, {}, ranks=2, errors=errors) == [0, 0], errors
