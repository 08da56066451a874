from __future__ import annotations

from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("general_experts.py")


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (4, {"expert": 2, "shard": True}),
        pytest.param(2, {"expert": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"expert": 4}, marks=pytest.mark.slow),
    ],
)
def test_gated_experts_with_a_norm_and_a_shared_one(ranks, mesh, launch, tmp_path):
    """The norm of each weight's gradient is that of one process."""
    found = []
    for number, (size, given) in enumerate([(1, {}), (ranks, mesh)]):
        out, errors = str(tmp_path / str(number)), []
        assert launch(PROGRAM, {"out": out, "mesh": given}, ranks=size, errors=errors) == [0] * size, errors
        found.append(torch.load(out, weights_only=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert found[0].min() > 1e-6, "every weight has a gradient"
