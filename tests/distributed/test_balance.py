from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparse_mlp.distributed import sync_balance
from sparse_mlp.moe import MoeMlp

PROGRAM = Path(__file__).with_name("balance_gradients.py")


def test_gradients_of_two_ranks_are_those_of_one(launch, tmp_path):
    found = {}
    for name, ranks, sync in (("one", 1, True), ("two", 2, True), ("apart", 2, False)):
        out = str(tmp_path / name)
        errors: list[str] = []
        assert launch(PROGRAM, {"out": out, "sync": sync}, ranks=ranks, errors=errors) == [0] * ranks, errors
        found[name] = torch.load(out, weights_only=True)
    for name, gradient in found["one"].items():
        torch.testing.assert_close(found["two"][name], gradient, rtol=1e-6, atol=1e-6)
    # Without the sum the statistics are each rank's own, and the router learns something else.
    router = next(name for name in found["one"] if "router" in name)
    assert (found["apart"][router] - found["one"][router]).abs().max() > 1e-3


def test_alone_nothing_is_summed():
    model = nn.Sequential(MoeMlp(4, 4, 2), MoeMlp(4, 4, 2), nn.Linear(4, 4))
    assert sync_balance(model) == 2
    assert model[0].balance_reduce is None


def test_a_rank_without_an_item_takes_part(launch):
    errors: list[str] = []
    assert launch(PROGRAM.with_name("balance_without_items.py"), {}, ranks=2, errors=errors) == [0, 0], errors
