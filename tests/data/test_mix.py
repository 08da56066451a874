from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sparse_mlp.data import AugmentConfig, batch_mixer


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(size, 3, 6, 6, generator=generator),
        "target": torch.arange(size) % 5,
        "index": torch.arange(size) + 100,
    }


def partner(index: torch.Tensor) -> torch.Tensor:
    return ((index - 100) ^ 1).long()


def test_mixup_blends_neighbours_and_their_targets_alike():
    plain = batch()
    mixed = batch_mixer(AugmentConfig(mixup=1.0), 5)(plain, seed=1, step=4)
    own, other = (mixed["index"] - 100).long(), partner(mixed["index"])
    one_hot = torch.nn.functional.one_hot(plain["target"], 5).float()
    share = mixed["target"][0, plain["target"][own[0]]]  # neighbours have unlike targets
    assert 0 < share < 1
    assert_close(mixed["image"], share * plain["image"][own] + (1 - share) * plain["image"][other])
    assert_close(mixed["target"], share * one_hot[own] + (1 - share) * one_hot[other])


def test_cutmix_swaps_a_box_and_shares_the_target_by_its_area():
    plain = batch()
    mixed = batch_mixer(AugmentConfig(cutmix=1.0), 5)(plain, seed=0, step=1)
    own = (mixed["index"] - 100).long()
    kept = (mixed["image"] == plain["image"][own]).all(1)
    taken = (mixed["image"] == plain["image"][partner(mixed["index"])]).all(1)
    assert (kept ^ taken).all() and taken.any()
    shares = mixed["target"].gather(1, plain["target"][own, None])[:, 0]
    assert_close(shares, kept.float().mean((1, 2)))


def test_mixing_is_a_function_of_seed_and_step():
    mixer = batch_mixer(AugmentConfig(mixup=0.5, cutmix=1.0), 5)
    first, again = mixer(batch(), 0, 3), mixer(batch(), 0, 3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["target"], mixer(batch(), 0, 4)["target"])
    assert not torch.equal(first["target"], mixer(batch(), 1, 3)["target"])


def test_unmixed_batches_have_plain_targets():
    mixer = batch_mixer(AugmentConfig(mixup=1.0, mix_probability=0.0), 5)
    mixed = mixer(batch(), 0, 0)
    assert mixed["target"].sum() == 8 and mixed["target"].max() == 1


def test_no_mixer_without_alpha():
    assert batch_mixer(AugmentConfig(), 5) is None


@pytest.mark.parametrize("config", [AugmentConfig(mix_probability=0.5), AugmentConfig(mixup=1.0, cutmix_share=0.1)])
def test_options_without_effect_are_errors(config: AugmentConfig):
    with pytest.raises(ValueError, match="would be ignored"):
        batch_mixer(config, 5)
