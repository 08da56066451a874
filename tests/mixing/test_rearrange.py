"""Regions against a loop over the definition, there and back, for sizes that regions and steps do not divide."""

from __future__ import annotations

import pytest
import torch

from sparse_mlp.mixing.rearrange import merge_regions, split_regions

CASES = [(7, 3, 0), (8, 4, 2), (14, 3, 1), (14, 3, 2), (7, 2, 1), (1, 2, 0), (2, 3, 2), (1, 4, 2)]  # size, region, step


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("size", "region", "step"), CASES)
def test_regions_hold_the_positions_of_the_rolled_map(size, region, step, axis):
    x = torch.randn(2, size, 5, 3) if axis == 1 else torch.randn(2, 5, size, 3)
    tokens = merge_regions(x, region, step, axis)
    assert tokens.shape[axis] == -(-size // region) and tokens.shape[-1] == 3 * region
    for i in range(tokens.shape[axis] * region):
        place = tokens.select(axis, i // region)[..., i % region * 3 : (i % region + 1) * 3]
        assert torch.equal(place, x.select(axis, (i - step) % size))
    assert torch.equal(split_regions(tokens, region, step, axis, size), x)


def test_gradients():
    x = torch.randn(1, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    for axis in (1, 2):
        assert torch.autograd.gradcheck(lambda x, axis=axis: merge_regions(x, 3, 1, axis), x)
