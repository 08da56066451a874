"""Every variant of the kin, not the smallest alone, against its published form: logits and dense maps at odd sizes.

In float64, as the filled weights blow small rounding up in deep Hire-MLPs.
"""

from __future__ import annotations

import pytest
import timm
import torch

from sparse_mlp.models import registered_names
from sparse_mlp.weights import convert

NAMES = [name for name in registered_names() if name.startswith(("as_mlp", "cycle_mlp", "hire_mlp"))]
pytestmark = pytest.mark.slow  # constructs and fills up to 96 M parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(65, 97), (227, 301)], ids=str)
def test_logits(reference, name, size):
    published, state_dict = reference.weights(name)
    model = timm.create_model(name).eval()
    model.load_state_dict(convert({"model": {f"module.{key}": value for key, value in state_dict.items()}}, name))
    images = reference.images(1, *size).double()
    with torch.inference_mode():
        expected, logits = published.double()(images), model.double()(images)
    assert (logits - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_dense_maps(reference, name):
    published, state_dict = reference.weights(name, dense=True)
    model = timm.create_model(name, features_only=True, output_norms=True).eval()
    model.load_state_dict(convert(state_dict, name))
    images = reference.images(1, 250, 186).double()
    with torch.inference_mode():
        expected, maps = published.double()(images), model.double()(images)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-7 * theirs.abs().max()
