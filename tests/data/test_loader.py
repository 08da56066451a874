from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mlp.data import AugmentConfig, Batch, DataConfig, ImageData, build_datasets, eval_loader, steps_per_epoch
from sparse_mlp.data import train_loader as loader
from sparse_mlp.data.randomness import epoch_order

CONFIG = DataConfig(name="digits", batch_size=100)
VARIED = AugmentConfig(pad=1, rotate=10, erase=0.2)
MIXED = replace(VARIED, mixup=0.4, cutmix=1.0)
PER_EPOCH = 11  # 1,198 training images


@pytest.fixture(scope="module")
def varied() -> ImageData:
    return build_datasets(CONFIG, VARIED)


@pytest.fixture(scope="module")
def mixed() -> ImageData:
    return build_datasets(CONFIG, MIXED)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in ("image", "target", "index")
    )


def test_a_batch_is_images_targets_and_indices(varied: ImageData):
    (batch,) = loader(varied, CONFIG, 0, steps=1)
    assert batch["image"].shape == (100, 1, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["target"].shape == (100,) and batch["target"].dtype == torch.long
    assert torch.equal(batch["target"], varied.train.labels[batch["index"]])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [4, 17])
def test_resumed_stream_is_the_uninterrupted_one_to_the_bit(mixed: ImageData, workers: int, start: int):
    whole = list(loader(mixed, CONFIG, 3, steps=25))
    config = replace(CONFIG, workers=workers)
    resumed = list(loader(mixed, config, 3, start_step=start, steps=25 - start))
    assert same(whole[start:], resumed)


@pytest.mark.parametrize("data", ["varied", "mixed"])
def test_slices_of_two_ranks_make_the_batch_of_one(data: str, request: pytest.FixtureRequest):
    images = request.getfixturevalue(data)
    whole = list(loader(images, CONFIG, 1, start_step=9, steps=4))
    ranks = [list(loader(images, CONFIG, 1, start_step=9, steps=4, rank=r, world_size=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        both = {name: torch.cat([ranks[0][step][name], ranks[1][step][name]]) for name in batch}
        # Mixing sets the images of a batch in another order; by index they are the same.
        order, other = batch["index"].argsort(), both["index"].argsort()
        assert same([{k: v[order] for k, v in batch.items()}], [{k: v[other] for k, v in both.items()}])
        if data == "varied":
            assert torch.equal(batch["index"], both["index"])


def test_seed_and_epoch_change_order_and_pixels(varied: ImageData):
    first, second = list(loader(varied, CONFIG, 0, steps=1)), list(loader(varied, CONFIG, 1, steps=1))
    later = list(loader(varied, CONFIG, 0, start_step=PER_EPOCH, steps=1))
    assert not torch.equal(first[0]["index"], second[0]["index"])
    assert not torch.equal(first[0]["index"], later[0]["index"])
    index = [5]
    assert not torch.equal(varied.train.batch(index, (0, 0))["image"], varied.train.batch(index, (0, 1))["image"])
    assert not torch.equal(varied.train.batch(index, (0, 0))["image"], varied.train.batch(index, (1, 0))["image"])


@settings(max_examples=40, deadline=None)
@given(images=st.integers(1, 300), batch=st.integers(1, 60), epoch=st.integers(0, 5), seed=st.integers(0, 2**40))
def test_an_epoch_takes_no_image_twice(images: int, batch: int, epoch: int, seed: int):
    order = epoch_order(images, seed, epoch)
    assert sorted(order) == list(range(images))
    used = order[: images // batch * batch]
    assert len(set(used)) == len(used) > images - batch or images < batch


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 40), steps=st.integers(0, 6), split=st.integers(0, 6), seed=st.integers(0, 9))
def test_any_cut_of_the_stream_joins(varied: ImageData, start: int, steps: int, split: int, seed: int):
    split = min(split, steps)
    whole = list(loader(varied, CONFIG, seed, start_step=start, steps=steps))
    parts = list(loader(varied, CONFIG, seed, start_step=start, steps=split))
    parts += loader(varied, CONFIG, seed, start_step=start + split, steps=steps - split)
    assert len(whole) == steps and same(whole, parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(mixed: ImageData, workers: int):
    config = replace(CONFIG, workers=workers)
    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(loader(mixed, config, 0, steps=3)), list(eval_loader(mixed, config))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once(varied: ImageData, world: int, workers: int):
    config = replace(CONFIG, eval_batch_size=70, workers=workers)
    seen = [
        i
        for rank in range(world)
        for batch in eval_loader(varied, config, rank, world)
        for i in batch["index"].tolist()
    ]
    assert sorted(seen) == list(range(599))


def test_evaluation_can_be_run_again_and_is_not_varied(varied: ImageData):
    batches = eval_loader(varied, CONFIG)
    assert same(list(batches), list(batches))


def test_batch_larger_than_the_set_is_an_error(varied: ImageData):
    with pytest.raises(ValueError, match="2000 is more than the 1198 training images"):
        steps_per_epoch(varied, replace(CONFIG, batch_size=2000))


def test_batch_must_divide_over_ranks(varied: ImageData):
    with pytest.raises(ValueError, match="does not divide over 3 ranks"):
        loader(varied, CONFIG, 0, steps=1, world_size=3)


def test_mixing_needs_even_slices(mixed: ImageData):
    with pytest.raises(ValueError, match="even number of images"):
        loader(mixed, replace(CONFIG, batch_size=50), 0, steps=1, world_size=2)


REPEATED = replace(CONFIG, repeats=3)


@pytest.mark.parametrize("step", [0, 5, 14])
def test_repeats_show_each_image_of_a_batch_three_times_varied_anew(varied: ImageData, step: int):
    (batch,) = loader(varied, REPEATED, 4, start_step=step, steps=1)
    epoch, position = divmod(step, PER_EPOCH)
    shown = np.repeat(epoch_order(1198, 4, epoch), 3)[position * 100 : (position + 1) * 100]  # DeiT's sampler
    assert sorted(batch["index"].tolist()) == sorted(shown)
    assert torch.equal(batch["target"], varied.train.labels[batch["index"]])
    copies = [batch["image"][batch["index"] == i] for i in np.unique(shown)]
    assert [len(c) for c in copies].count(3) >= 32
    assert all(not torch.equal(a, b) for c in copies for n, a in enumerate(c) for b in c[:n])


def test_repeats_leave_the_length_of_an_epoch_and_show_a_third_of_the_images(varied: ImageData):
    batches = list(loader(varied, REPEATED, 0, steps=PER_EPOCH))
    assert steps_per_epoch(varied, REPEATED) == PER_EPOCH
    seen = torch.cat([batch["index"] for batch in batches]).unique(return_counts=True)[1]
    assert len(seen) == -(-PER_EPOCH * 100 // 3) and seen[:-1].float().mean() > 2.9 and seen.max() == 3


@pytest.mark.parametrize("world", [2, 4])
def test_repeats_are_cut_over_ranks_and_resumed_like_any_batch(mixed: ImageData, world: int):
    whole = list(loader(mixed, REPEATED, 1, steps=14))
    assert same(whole[9:], list(loader(mixed, replace(REPEATED, workers=2), 1, start_step=9, steps=5)))
    plain = build_datasets(CONFIG, VARIED)
    ranks = [list(loader(plain, REPEATED, 1, steps=2, rank=r, world_size=world)) for r in range(world)]
    for step, batch in enumerate(loader(plain, REPEATED, 1, steps=2)):
        assert same([batch], [{name: torch.cat([rank[step][name] for rank in ranks]) for name in batch}])
    if world == 4:  # no fewer ranks than copies: each copy is on another rank
        assert all(len(rank[0]["index"].unique()) == 25 for rank in ranks)


def test_neighbours_which_are_mixed_are_different_images(varied: ImageData):
    for batch in loader(varied, REPEATED, 2, steps=PER_EPOCH):
        assert (batch["index"][::2] != batch["index"][1::2]).all()
