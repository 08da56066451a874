"""Recipes that begin with the weights of something pre-trained: linear probe, kNN, fine-tuning, transfer.

`--model.weights` names a run folder or a file, or `--model.name NAME --model.pretrained` takes what timm publishes.
From a run folder come the model, its arguments and, unless another set is named, the images. A recipe without weights
is the published one, for ImageNet; with weights it fits itself to the images: a grey 8x8 digit is neither cropped to a
twelfth nor flipped, and a batch is no larger than a sixteenth of the set. Learning rates are proportional to the batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import Dataset

from sparse_mlp.data import AugmentConfig, DataConfig, check_trusted
from sparse_mlp.data.sets import ignored_options
from sparse_mlp.engine import OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig, adjust_dependent
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.images import OWN_DATASETS, load_data_config, load_model_config
from sparse_mlp.jobs.knn import KnnRecipe
from sparse_mlp.recipes.augmentation import CROP_AND_FLIP, DEIT
from sparse_mlp.recipes.facts import inspect_dataset
from sparse_mlp.tasks.classify import ClassifyConfig

R = TypeVar("R", ClassifyRecipe, KnnRecipe)

Datasets = tuple[Dataset, Dataset] | None

NOT_GIVEN = ""
"""As a model's or a data set's name: those of the run that the weights come from."""

_REGULARISATION = ("drop_rate", "proj_drop_rate", "drop_path_rate")  # arguments that no weight depends on


def linear_probe(given: ClassifyRecipe | None = None, datasets: Datasets = None) -> ClassifyRecipe:
    """Linear probe as MoCo v3 has it: frozen backbone, SGD, 90 epochs, learning rate 3 x batch / 256, crop and flip.

    sparse-mlp train linear_probe --model.weights runs/pretrained
    """
    recipe = ClassifyRecipe(
        name="linear_probe",
        model=ModelConfig(NOT_GIVEN),
        data=DataConfig(NOT_GIVEN, batch_size=1024),
        augment=CROP_AND_FLIP,
        task=ClassifyConfig(frozen=True),
        optim=OptimConfig(opt="sgd", momentum=0.9, lr=3.0 * 1024 / 256, weight_decay=0.0),
        train=TrainConfig(epochs=90, log_every=50),
    )
    return _fit_to_images(_start_from_weights(recipe, given), datasets) if given else recipe


def knn(given: KnnRecipe | None = None) -> KnnRecipe:
    """Weighted nearest neighbours of the features (k = 20, temperature 0.07); one pass over the images, no training.

    sparse-mlp train knn --model.weights runs/pretrained
    """
    recipe = KnnRecipe(name="knn", model=ModelConfig(NOT_GIVEN), data=DataConfig(NOT_GIVEN))
    return _start_from_weights(recipe, given) if given else recipe


def finetune(given: ClassifyRecipe | None = None, datasets: Datasets = None) -> ClassifyRecipe:
    """Fine-tuning by DeiT's recipe as MoCo v3 uses it: 150 epochs, AdamW, learning rate 5e-4 x batch / 512, mixing.

    sparse-mlp train finetune --model.weights runs/pretrained
    sparse-mlp train finetune --model.weights runs/pretrained --optim.layer-decay 0.75
    """
    recipe = ClassifyRecipe(
        name="finetune",
        model=ModelConfig(NOT_GIVEN, {"drop_path_rate": 0.1}),
        data=DataConfig(NOT_GIVEN, batch_size=1024),
        augment=DEIT,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=5e-4 * 1024 / 512, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5),
        train=TrainConfig(epochs=150, log_every=50),
    )
    return _fit_to_images(_start_from_weights(recipe, given), datasets) if given else recipe


def semi_supervised(given: ClassifyRecipe | None = None, datasets: Datasets = None) -> ClassifyRecipe:
    """Fine-tuning on a tenth of the labels (--data.label-share 0.01 for a hundredth), rates falling with the depth.

    sparse-mlp train semi_supervised --model.weights runs/pretrained
    """
    recipe = finetune(given, datasets)
    share = given.data.label_share if given else None
    return replace(
        recipe,
        name="semi_supervised",
        data=replace(recipe.data, label_share=share or 0.1),
        optim=replace(recipe.optim, layer_decay=0.75),
    )


def transfer_cifar10(given: ClassifyRecipe | None = None) -> ClassifyRecipe:
    """Fine-tuning on CIFAR-10 by MoCo v3's transfer recipe: 100 epochs, batch 1024, learning rate 3e-4.

    sparse-mlp train transfer_cifar10 --model.weights runs/pretrained
    """
    return _transfer("cifar10", 0.8, given)


def transfer_cifar100(given: ClassifyRecipe | None = None) -> ClassifyRecipe:
    """Fine-tuning on CIFAR-100 by MoCo v3's transfer recipe: as on CIFAR-10, with mixup 0.5.

    sparse-mlp train transfer_cifar100 --model.weights runs/pretrained
    """
    return _transfer("cifar100", 0.5, given)


def _transfer(data: str, mixup: float, given: ClassifyRecipe | None) -> ClassifyRecipe:
    recipe = ClassifyRecipe(
        name=f"transfer_{data}",
        model=ModelConfig(NOT_GIVEN),
        data=DataConfig(name=data, batch_size=1024, download=True),
        augment=AugmentConfig(crop_scale=(0.05, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, mixup=mixup, cutmix=1.0),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=3e-4, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_epochs=3),
        train=TrainConfig(epochs=100, log_every=20),
    )
    return _start_from_weights(recipe, given) if given else recipe


def _start_from_weights(recipe: R, given: R) -> R:
    """The recipe with the model and the images of the weights that were given. UserError if they do not say enough."""
    source, model = given.model.weights, given.model
    if source is None:
        if model.name == NOT_GIVEN or not model.pretrained:
            raise UserError(
                f"{recipe.name} begins with weights: --model.weights RUN_OR_FILE, or --model.name NAME "
                "--model.pretrained for those that timm publishes"
            )
        return _choose_images(
            replace(recipe, model=replace(recipe.model, name=model.name, pretrained=True)), given, None
        )
    path = Path(source)
    regular = {name: value for name, value in recipe.model.args.items() if name in _REGULARISATION}
    if path.is_dir():
        stored = load_model_config(RunFolder.open(path), named=model.name)
        model = replace(stored, args={**stored.args, **regular}, pretrained=False)
    elif not path.is_file():
        raise FileNotFoundError(f"there is no run folder and no file of weights {source}")
    elif model.name == NOT_GIVEN:
        raise UserError(f"which model are the weights in {source} of? --model.name NAME")
    else:
        model = ModelConfig(model.name, regular)
    return _choose_images(replace(recipe, model=replace(model, weights=str(path.resolve()))), given, path)


def _choose_images(recipe: R, given: R, source: Path | None) -> R:
    """The recipe with the images that the user named, else with those of the run that the weights come from."""
    sizes: dict[str, Any] = {"batch_size": recipe.data.batch_size, "eval_batch_size": recipe.data.eval_batch_size}
    if recipe.data.name != NOT_GIVEN and given.data.name in (NOT_GIVEN, recipe.data.name):
        return recipe
    if given.data.name != NOT_GIVEN:
        return replace(recipe, data=replace(given.data, **sizes))
    root = given.data.root
    if source is not None and source.is_dir():
        stored = load_data_config(RunFolder.open(source))
        if root is None:  # the folder may come from elsewhere: what only it names is not fetched or executed
            check_trusted(stored)
            return replace(recipe, data=replace(stored, download=given.data.download, **sizes))
        if stored.name != OWN_DATASETS and "root" not in ignored_options(stored.name):  # that set, in another place
            return replace(recipe, data=replace(stored, root=root, **sizes))
    if root is not None:
        return replace(recipe, data=replace(given.data, name="folder", **sizes))
    raise UserError(f"on which images? {source or 'a published model'} does not say: --data.name SET")


def _fit_to_images(recipe: ClassifyRecipe, datasets: Datasets) -> ClassifyRecipe:
    """The recipe with a batch and an augmentation that suit the images; its rates follow the batch."""
    facts = inspect_dataset(replace(recipe.data, batch_size=1), datasets)
    augment = recipe.augment
    if facts.small:
        augment = replace(augment, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), auto_augment=None, erase=0.0)
        # A linear probe of the digits has 96.8 % without shifts, 89.7 % with them.
        augment = replace(augment, pad=0 if recipe.task.frozen else facts.image_size // 8)
    if facts.grey:  # digits, letters, x-rays: a mirror image has another meaning
        augment = replace(augment, flip=0.0, auto_augment=None)
    fitted = replace(recipe, augment=augment, data=replace(recipe.data, batch_size=facts.batch_size(1024)))
    return adjust_dependent(recipe, fitted)
