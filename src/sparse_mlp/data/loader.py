"""Batches by step: the data stream of a run is a function of (seed, step), however often it is stopped and resumed."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sparse_mlp.data.mix import BatchMixer
from sparse_mlp.data.randomness import epoch_order, preserved_generators, seed_generators, step_seed
from sparse_mlp.data.sets import ImageData
from sparse_mlp.errors import UserError

Batch = dict[str, Any]
"""`image`, `target` and `index`: tensors or lists with one entry an image."""


class IndexedSet(Protocol):
    """Images with their targets, by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        """The images at `indices`: augmented as (seed, epoch) says, or as they are evaluated where it is None."""
        ...


class Sets(Protocol):
    """What is trained and tested on: images of classes, or of one of the dense tasks."""

    @property
    def train(self) -> Any:
        """An IndexedSet, or one of timm's streams."""

    @property
    def test(self) -> Any:
        """An IndexedSet, or one of timm's streams."""

    @property
    def mixer(self) -> BatchMixer | None:
        """Mixes every training batch."""


class Loading(Protocol):
    """How images are loaded: the fields of a data configuration that are read here."""

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def eval_batch_size(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def workers(self) -> int: ...


def steps_per_epoch(data: Sets, config: Loading) -> int:
    """Whole batches in the training set, independent of `config.repeats`. The other images are not used in that epoch.

    Raises UserError where the set is smaller than a batch or its length is unknown.
    """
    images = len(data.train)
    if images == 0:
        raise UserError(f"{config.name} does not tell how many images it has; give --data.num-samples")
    if images < config.batch_size:
        raise UserError(f"data.batch_size {config.batch_size} is more than the {images} training images")
    return images // config.batch_size


def train_loader(
    data: Sets,
    config: Loading,
    seed: int,
    *,
    start_step: int = 0,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterable[Batch]:
    """The batches of steps start_step .. start_step + steps - 1; rank r gets the r-th slice of each.

    Images and labels of a step depend on (seed, step) alone, not on workers, ranks or where the loader started; each
    image comes at most `config.repeats` times an epoch. Only for a stream (timm's IterableDataset) order and
    augmentation also depend on the number of workers and ranks; there a start within an epoch reads and drops the
    batches before it.

    Raises UserError where the batch does not divide over the ranks, a slice is odd and mixup or cutmix is on, or a
    stream is to be repeated.
    """
    local = config.batch_size // world_size
    if local * world_size != config.batch_size:
        raise UserError(f"data.batch_size {config.batch_size} does not divide over {world_size} ranks")
    if data.mixer and local % 2:
        raise UserError(f"mixup and cutmix need an even number of images on each rank, not {local}")
    per_epoch = steps_per_epoch(data, config)
    stop = start_step + steps
    if isinstance(data.train, IterableDataset):
        assert isinstance(data, ImageData)
        if config.repeats > 1:
            raise UserError(f"data.repeats {config.repeats} would be ignored: {config.name} is a stream")
        return _StreamSteps(data, config, local, seed, range(start_step, stop), per_epoch)
    batches = _TrainSteps(data.train, data.mixer, seed, config, per_epoch, rank, world_size)
    return Batches(batches, range(start_step, stop), config.workers)


def eval_loader(data: Sets, config: Loading, rank: int = 0, world_size: int = 1) -> Iterable[Batch]:
    """The test images, every one on exactly one rank, in order; the last batch may be smaller."""
    if isinstance(data.test, IterableDataset):
        assert isinstance(data, ImageData)
        _set_num_workers(data.test, config.workers)
        return _StreamEval(data, config)
    own = np.arange(rank, len(data.test), world_size)
    parts = [own[i : i + config.eval_batch_size] for i in range(0, len(own), config.eval_batch_size)]
    return Batches(_EvalSteps(data.test, parts), range(len(parts)), config.workers)


class Batches:
    """Iterates the batches of a step-indexed dataset; the same each time. An error of a worker is raised as it was."""

    def __init__(self, dataset: Dataset, steps: range, workers: int) -> None:
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_parent,
            # Its own generator: starting workers must not draw from the one that the training uses.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if isinstance(batch, Exception):
                raise batch
            if len(batch["target"]):  # an evaluation batch may consist of skipped images only
                yield batch


class _TrainSteps(Dataset):
    """Item `step` is this rank's slice of the batch of that step.

    With repeats the epoch is the first part of its order, each image as often in a row. A batch has all first copies
    before all second ones, so that the copies of an image are on different ranks and not mixed with each other. A copy
    is augmented as its image is in an epoch of its own number.
    """

    def __init__(
        self,
        images: IndexedSet,
        mixer: BatchMixer | None,
        seed: int,
        config: Loading,
        per_epoch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.images, self.mixer, self.seed = images, mixer, seed
        self.batch_size, self.repeats, self.per_epoch = config.batch_size, config.repeats, per_epoch
        local = config.batch_size // world_size
        self.slice = slice(rank * local, (rank + 1) * local)

    def __getitem__(self, step: int) -> Batch | Exception:
        epoch, position = divmod(step, self.per_epoch)
        image, copy = np.divmod(np.arange(position * self.batch_size, (position + 1) * self.batch_size), self.repeats)
        own = np.argsort(copy, kind="stable")[self.slice]
        indices, copy = epoch_order(len(self.images), self.seed, epoch)[image[own]], copy[own]
        try:
            batch = _concatenate(
                [self.images.batch(indices[copy == c], (self.seed, epoch * self.repeats + c)) for c in np.unique(copy)]
            )
        except (OSError, ValueError) as error:  # raised in the main process, where its message stays one line
            return error
        return self.mixer(batch, self.seed, step) if self.mixer else batch


def _concatenate(parts: list[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _EvalSteps(Dataset):
    """Item i is the i-th of the given index lists as a batch."""

    def __init__(self, images: IndexedSet, parts: list[np.ndarray]) -> None:
        self.images, self.parts = images, parts

    def __getitem__(self, i: int) -> Batch | Exception:
        try:
            return self.images.batch(self.parts[i])
        except (OSError, ValueError) as error:
            return error


class _StreamSteps:
    """Training batches of a stream: epoch by epoch, `per_epoch` batches of each at most."""

    def __init__(self, data: ImageData, config: Loading, local: int, seed: int, steps: range, per_epoch: int) -> None:
        self.dataset: Any = data.train
        self.mixer, self.classes, self.config, self.local = data.mixer, len(data.classes), config, local
        self.seed, self.steps, self.per_epoch = seed, steps, per_epoch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        step = self.steps.start
        while step < self.steps.stop:
            epoch, skipped = divmod(step, self.per_epoch)
            before = step
            for batch in islice(self._epoch(epoch), skipped, min(self.per_epoch, skipped + self.steps.stop - step)):
                yield self.mixer(batch, self.seed, step) if self.mixer else batch
                step += 1
            if step < self.steps.stop and step % self.per_epoch:
                raise UserError(
                    f"{self.config.name} ended after {step - before + skipped} of {self.per_epoch} batches; "
                    "give the true number of images with --data.num-samples"
                )

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        _set_num_workers(self.dataset, self.config.workers)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        dataset = _restarted(self.dataset, epoch)
        loader = iter(_stream_loader(dataset, self.local, self.config.workers, self.seed + epoch, drop_last=True))
        for position in range(self.per_epoch):
            with preserved_generators():  # without workers the transforms draw in this process
                seed_generators(step_seed(self.seed, epoch * self.per_epoch + position))
                batch = next(loader, None)
            if batch is None:
                return
            yield _stream_batch(batch, self.config.name, self.classes)


class _StreamEval:
    """Evaluation batches of a stream, which shards itself over the ranks."""

    def __init__(self, data: ImageData, config: Loading) -> None:
        self.loader = _stream_loader(data.test, config.eval_batch_size, config.workers, 0, drop_last=False)
        self.name, self.classes = config.name, len(data.classes)

    def __iter__(self) -> Iterator[Batch]:
        return (_stream_batch(batch, self.name, self.classes) for batch in self.loader)


def _stream_loader(dataset: Any, batch_size: int, workers: int, seed: int, drop_last: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator().manual_seed(seed),
    )


def _restarted(dataset: Any, epoch: int) -> Any:
    """A copy of the stream that starts from its beginning.

    timm's readers continue their shuffling from the last epoch, which a resumed run cannot reproduce. Worker processes
    start from a new copy.
    """
    dataset = copy.copy(dataset)
    dataset.reader = reader = copy.copy(dataset.reader)
    if hasattr(reader, "worker_seed"):
        reader.worker_seed += epoch
    return dataset


def _stream_batch(batch: Any, name: str, classes: int) -> Batch:
    image, target = batch
    if target.min() < 0 or target.max() >= classes:
        wrong = target[(target < 0) | (target >= classes)][0].item()
        raise UserError(f"{name} holds the label {wrong}, and data.num_classes {classes} allows 0 to {classes - 1}")
    # A stream has no positions to name its images by.
    return {"image": image, "target": target.long(), "index": torch.full((len(target),), -1)}


def _set_num_workers(dataset: Any, workers: int) -> None:
    if hasattr(dataset, "set_loader_cfg"):
        dataset.set_loader_cfg(num_workers=workers)


def _leave_signals_to_parent(_worker: int) -> None:
    """Ignore the first SIGTERM: like Ctrl-C it reaches the whole process group, and the training process decides when
    its workers end. It may end them by SIGTERM too, so the second one, or a minute after the first, ends the worker."""
    warned = False

    def end_if_warned(number: int, _: FrameType | None) -> None:
        nonlocal warned
        if warned:
            os._exit(0)  # any other status would be an error in the training process
        warned = True
        signal.alarm(60)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_if_warned)
    signal.signal(signal.SIGALRM, end_if_warned)
