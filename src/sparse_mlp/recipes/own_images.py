"""Any timm model on images of your own: `sparse-mlp train cycle_mlp_b1 --data.root photos/`.

The settings follow from the folder: image size and channels from a sample of its files, batch and length from how many
images it has, augmentation from both; published weights are used where they exist and can be fetched. The settings are
starting points for some dozens to some tens of thousands of images, not the result of a search.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch.utils.data import Dataset

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import LENGTHS, OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import Context, ModelConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.images import file_names, open_images
from sparse_mlp.recipes.facts import DatasetFacts
from sparse_mlp.tasks.classify import ClassifyConfig

_log = logging.getLogger(__name__)

_SAMPLED_FILES = 64  # whose size and colours are read
_IMAGES_SEEN = 15_000  # images that a run from scratch sees, all epochs together, between the limits on the epochs
_MAX_SIDE_ON_CPU = 128  # pixels: larger images take hours without a GPU
_GREY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L")


def fit_to_images(
    default: ClassifyRecipe, given: ClassifyRecipe, datasets: tuple[Dataset, Dataset] | None = None
) -> ClassifyRecipe:
    """The settings for the model on the images that the user named, or the user's own. UserError if there are none."""
    if given.data.root is None and given.data.name == default.data.name:
        raise UserError(
            f"which images? {default.name} is a model: --data.root FOLDER, or --data.name SET; "
            "sparse_mlp.recipe takes datasets=(train, test) too"
        )
    data = given.data
    if data.root is not None and data.name == default.data.name:
        data = replace(data, name="folder")
    context = Context(trusted=True, datasets=datasets)
    dataset = open_images(replace(data, batch_size=1), AugmentConfig(), context)
    count = len(dataset.train)  # type: ignore[arg-type]
    if not count:
        raise UserError(f"data.test_share {data.test_share} leaves no image of {data.root or data.name} to train on")
    model = replace(given.model, pretrained=given.model.weights is None and can_fetch(given.model))
    from_weights = model.pretrained or model.weights is not None
    sampled = range(0, count, max(1, count // _SAMPLED_FILES))
    names = file_names(dataset.train, sampled) if datasets is None else None
    files = [Path(data.root or "", name) for name in names or ()]
    side, grey = _median_side(files) if files else (dataset.spec.image_size, dataset.spec.channels == 1)
    size = data.image_size or _image_size(given.model.name, side, from_weights)
    channels = data.channels or (1 if grey else 3)
    facts = DatasetFacts(count, len(dataset.classes), size, channels)
    recipe = _settings(facts, from_weights)
    batch_size = recipe.data.batch_size
    recipe = replace(
        recipe,
        schedule=_schedule(default.train, given.train, recipe, facts),
        name=default.name,
        model=replace(default.model, pretrained=model.pretrained),
        data=replace(default.data, name=data.name, image_size=size, channels=channels, batch_size=batch_size),
    )
    start = "published weights" if model.pretrained else model.weights or "from scratch"
    _log.info(
        "%s on %s: %s training images, %s classes, %s x %s pixels, %s; %s",
        model.name,
        data.root or data.name,
        count,
        facts.classes,
        size,
        size,
        "grey" if facts.grey else "colour",
        start,
    )
    return recipe


def describe(recipe: ClassifyRecipe) -> None:
    """Log the settings that a run has in the end, whether they were chosen here or given."""
    train, augment = recipe.train, recipe.augment
    length = ", ".join(f"{value:g} {unit}" for unit in LENGTHS if (value := getattr(train, unit)) is not None)
    varied = [name for name, value in vars(augment).items() if value != getattr(AugmentConfig(), name)]
    _log.info(
        "batch %s, %s, learning rate %.2g; augmentation: %s; each is an option: --train.epochs, --data.batch-size, ...",
        recipe.data.batch_size,
        length,
        recipe.optim.lr,
        ", ".join(varied) or "none",
    )


def _schedule(default: TrainConfig, given: TrainConfig, recipe: ClassifyRecipe, facts: DatasetFacts) -> ScheduleConfig:
    """A warm-up of a tenth of the run, of the length that is given where one is."""
    epochs = given.epochs if given.epochs != default.epochs else None
    if given.steps is not None:
        epochs = given.steps * recipe.data.batch_size / facts.images
    if epochs is None or not 0 < epochs < math.inf:  # what cannot be is refused with the rest of the recipe
        epochs = recipe.train.epochs or 0
    return ScheduleConfig(warmup_epochs=epochs / 10)


def _settings(facts: DatasetFacts, from_weights: bool) -> ClassifyRecipe:
    """Batch, length, rates and augmentation; `from_weights` if the model starts from trained weights."""
    batch = facts.batch_size(64 if not torch.cuda.is_available() else 256)
    epochs = min(100, max(10, round(_IMAGES_SEEN / facts.images)))
    augment = AugmentConfig(flip=0.0 if facts.grey else 0.5, pad=facts.image_size // 8 if facts.small else 0)
    if not facts.small:
        augment = replace(augment, crop_scale=(0.35, 1.0), crop_ratio=(3 / 4, 4 / 3))
        if not facts.grey:
            augment = replace(augment, auto_augment="rand-m6-mstd0.5-inc1")
    return ClassifyRecipe(
        data=DataConfig(batch_size=batch),
        augment=augment,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=(1e-4 if from_weights else 1e-3) * max(1, batch / 32) ** 0.5, weight_decay=0.05),
        train=TrainConfig(epochs=max(10, epochs // 3) if from_weights else epochs, clip_grad=1.0),
    )


def _median_side(files: Sequence[Path]) -> tuple[int, bool]:
    """The median of the files' shorter sides in pixels, and whether all of them are grey."""
    sides, modes = [], set()
    for file in files:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except (OSError, Image.DecompressionBombError):  # named when it is read
            continue
    return (round(statistics.median(sides)), modes <= set(_GREY_MODES)) if sides else (224, False)


def _image_size(name: str, side: int, from_weights: bool) -> int:
    """The model's own size with trained weights or where it is fixed; else close to the images', a multiple of 32."""
    published = get_pretrained_cfg(name)
    own = published.input_size[-1] if published else 224
    if from_weights or (published is not None and published.fixed_input_size and side >= own):
        return own
    limit = own if torch.cuda.is_available() else min(own, _MAX_SIDE_ON_CPU)
    return max(32, round(min(limit, side) / 32) * 32)


def can_fetch(model: ModelConfig) -> bool:
    """Whether the weights that timm publishes for a model are in its cache or can be downloaded.

    UserError if they were asked for by name and cannot.
    """
    name, published = model.name, get_pretrained_cfg(model.name)
    if published is None or not published.has_weights:
        return False  # asked for by name, they are refused when the model is built
    try:
        _check_reachable(published)
        timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises different types without a network
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if model.pretrained:
            raise UserError(f"the published weights of {name} cannot be fetched here: {reason}") from error
        _log.warning(
            "the published weights of %s cannot be fetched here, the training starts from scratch: %s", name, reason
        )
        return False
    return True


def _check_reachable(published: PretrainedCfg) -> None:
    """OSError within seconds if the weights are neither cached nor reachable; the hub's client takes a minute."""
    if published.hf_hub_id:
        cached = isinstance(try_to_load_from_cache(published.hf_hub_id, "model.safetensors"), str)
        host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    else:
        address = urlparse(str(published.url or ""))
        cached = (Path(torch.hub.get_dir()) / "checkpoints" / Path(address.path).name).is_file()
        host = address.hostname
    if not cached and host:
        socket.create_connection((host, 443), timeout=5).close()
