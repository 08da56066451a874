"""Random numbers as pure functions of (seed, epoch, image) or (seed, step).

Nothing here has a state that a checkpoint would have to store: seed and step determine the batch.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Separate streams, so that the order of the images, their augmentation and the mixing do not repeat each other.
_ORDER, _DRAWS, _SEEDS, _STEP = range(4)


@functools.lru_cache(maxsize=2)
def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation (images,) in which an epoch visits the images."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(images)


@functools.lru_cache(maxsize=4)  # an epoch's repeats of the images come side by side
def epoch_draws(images: int, columns: int, seed: int, epoch: int) -> np.ndarray:
    """Uniform numbers (images, columns) in [0, 1): row i is what image i's augmentation consumes in that epoch."""
    return np.random.default_rng([_DRAWS, seed, epoch]).random((images, columns), dtype=np.float32)


@functools.lru_cache(maxsize=4)
def epoch_seeds(images: int, seed: int, epoch: int) -> np.ndarray:
    """One 32-bit seed an image (images,), for augmentations that draw from the global generators."""
    return np.random.default_rng([_SEEDS, seed, epoch]).integers(0, 2**32, images, dtype=np.uint32)


def step_seed(seed: int, step: int) -> int:
    """32-bit seed of what is drawn once a step."""
    return int(np.random.SeedSequence([_STEP, seed, step]).generate_state(1)[0])


def seed_generators(value: int) -> None:
    """Seed the global generators of Python, numpy and torch's CPU, which timm's and torchvision's transforms read."""
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - timm's policies and its Mixup draw from the legacy generator
    torch.default_generator.manual_seed(value)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Give the global generators of Python, numpy and torch's CPU their state back on leaving."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
