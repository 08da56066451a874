from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_mlp.distributed import sync_batch_norm

PROGRAM = Path(__file__).with_name("batch_norm_gradients.py")


def test_two_ranks_are_one(launch, tmp_path):
    found = {}
    for name, ranks, sync in (("one", 1, False), ("alone", 1, True), ("two", 2, True), ("apart", 2, False)):
        out, errors = str(tmp_path / name), []
        assert launch(PROGRAM, {"out": out, "sync": sync}, ranks=ranks, errors=errors) == [0] * ranks, errors
        found[name] = torch.load(out, weights_only=True)
    for name, value in found["one"].items():
        assert torch.equal(found["alone"][name], value)
        torch.testing.assert_close(found["two"][name], value, rtol=1e-5, atol=1e-5)
    first = "gradient 0.weight"
    assert (found["apart"][first] - found["one"][first]).abs().max() > 1e-3, "the comparison could not fail"


def test_names_types_and_copies_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    names = list(model.state_dict())
    assert sync_batch_norm(model) == 1
    assert list(model.state_dict()) == names and type(model[1]) is nn.BatchNorm1d
    twin = copy.deepcopy(model)
    twin(torch.randn(5, 3))
    assert twin[1].num_batches_tracked == 1 and model[1].num_batches_tracked == 0


def test_one_item_is_still_an_error():
    model = nn.Sequential(nn.BatchNorm1d(4))
    sync_batch_norm(model)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 4))
