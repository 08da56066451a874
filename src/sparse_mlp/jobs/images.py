"""What the kinds of run on images share: data, the files that describe them, and the timm model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from sparse_mlp.data import (
    AugmentConfig,
    BadImageError,
    DataConfig,
    ImageData,
    InputSpec,
    build_datasets,
    display_name,
    eval_loader,
    find_images,
    image_data_from,
    read_image,
    steps_per_epoch,
    train_loader,
)
from sparse_mlp.engine import Evaluation, Loaders, RunFolder
from sparse_mlp.errors import UserError
from sparse_mlp.files import read_json
from sparse_mlp.jobs.experts import (
    add_experts,
    as_stored,
    change_at_inference,
    check_at_inference,
    has_experts,
    sparsify_arguments,
)
from sparse_mlp.jobs.job import INPUTS, Context, Job, ReportOptions, check_export_target
from sparse_mlp.jobs.kinds import job_type
from sparse_mlp.jobs.model import (
    begin_optimizer,
    build_model,
    check_local,
    check_model_arguments,
    load_weights,
    model_to_start,
    without_weights,
)
from sparse_mlp.jobs.recipe import ModelConfig, Recipe, from_json
from sparse_mlp.report import ImageSource, Samples, images_to_explore, read_run, wanted_images, write_routing_report
from sparse_mlp.report.cost import count_macs, count_parameters
from sparse_mlp.weights.write import write_file

_log = logging.getLogger(__name__)

R = TypeVar("R", bound=Recipe)

SPLIT = "split.json"
"""File of a run folder: which images were training and which test images."""

OWN_DATASETS = "own"
"""What data.name becomes in the configuration of a run on a user's own datasets."""


@dataclass(frozen=True)
class RoutingReportOptions(ReportOptions):
    """How a run on whole images is reported."""

    images: Path | None = None
    """Folder of pictures: write routing.html, what the experts do with these, in place of the run's own page."""


class ImageJob(Job[R]):
    """A run on images: the recipe has `model: ModelConfig` and `data: DataConfig`."""

    free: ClassVar[frozenset[str]] = Job.free | {
        "data.root",
        "data.download",
        "data.workers",
        "data.eval_batch_size",
    }

    data: ImageData

    def __init__(self, recipe: R, context: Context | None = None) -> None:
        if context is not None and context.datasets is not None:
            recipe = replace(recipe, data=replace(recipe.data, name=OWN_DATASETS))  # type: ignore[attr-defined,call-arg]
        super().__init__(recipe, context)

    def model_config(self) -> ModelConfig:
        """The model to build, see `model_to_start`."""
        return model_to_start(self.recipe.model, self.context.run, self.context.trusted)  # type: ignore[attr-defined]

    def prepare(self, run: RunFolder, device: torch.device) -> None:
        self.check_folder(run)
        super().prepare(run, device)
        begin_optimizer(self.trainer, self.model_config())

    def check_folder(self, run: RunFolder) -> None:
        """Say what was left out. UserError for a new run inside its images, where its figures would be a class."""
        data: DataConfig = self.recipe.data  # type: ignore[attr-defined]
        if self.context.run is None and data.name == "folder" and data.root is not None:
            folder, root = run.path.resolve(), Path(data.root).resolve()
            if folder.is_relative_to(root):
                raise UserError(f"the run folder {run.path} lies among the images of {data.root}: name another --out")
        log_notes(self.data.notes)

    def inputs(self) -> dict[str, Any]:
        return {INPUTS: asdict(self.data.spec), SPLIT: self.data.split or None}

    def finish(self, run: RunFolder, evaluation: Evaluation) -> None:
        """Log which images could not be read."""
        log_skipped(self.data.bad_images())

    @classmethod
    def load(cls, run: RunFolder, checkpoint: Path | None = None) -> nn.Module:
        return load_trained(run, checkpoint)

    @classmethod
    def report_with(cls, run: RunFolder, options: ReportOptions) -> Path:
        if not isinstance(options, RoutingReportOptions) or options.images is None:
            return cls.report(run)
        if not run.has_checkpoint():
            raise UserError(f"{run.path} has no weights yet: there is no routing to show")
        spec, (_, macs) = load_inputs(run), cls.cost(run)
        return write_routing_report(run.path, cls.load(run), own_images(options.images, spec, macs), spec.classes)

    @classmethod
    def cost(cls, run: RunFolder) -> tuple[int | None, int | None]:
        """Of the model with its classifier, for one image; (None, None) for a run without weights of its own."""
        if not run.has_checkpoint():
            return None, None
        spec = load_inputs(run)
        model = build_model(without_weights(load_model_config(run)), spec)
        return count_parameters(model), count_macs(model, spec.channels, spec.image_size)[""]

    @classmethod
    def export(cls, run: RunFolder, target: Path) -> str:
        """Bare timm weights without a classifier, as a safetensors file; the code that loads it is tested."""
        check_export_target(target)
        return export_backbone(load_model_config(run), load_inputs(run), run, target)


def open_images(
    data: DataConfig, augment: AugmentConfig, context: Context, *, classes: Sequence[str] | None = None
) -> ImageData:
    """The data of a recipe; of a run that exists, split as it was when the run began.

    With `classes`, labels are indices into these names, not into those of the set.
    """
    if context.datasets is not None:
        found = image_data_from(*context.datasets, config=data, augment=augment)
    elif data.name == OWN_DATASETS:
        raise UserError("the run was trained on datasets of a program's own: pass them as `datasets` again")
    else:
        split = load_split(context.run) if context.run is not None else None
        found = build_datasets(data, augment, split=split, classes=classes, trusted=context.trusted)
    if context.run is not None and (context.run.path / INPUTS).is_file():
        _check_classes(found, context.run)
    return found


def _check_classes(found: ImageData, run: RunFolder) -> None:
    """UserError if the images of a run, whose folder may have changed or moved, are of other classes than before."""
    trained = load_inputs(run).classes
    if tuple(found.classes) != trained:
        changed = [f"{name!r} is new" for name in found.classes if name not in trained]
        changed += [f"{name!r} is gone" for name in trained if name not in found.classes]
        listed = "; ".join(changed[:5]) or "they are in another order"
        raise UserError(f"the classes of the images are not those that {run.path} was trained on: {listed}")


def image_loaders(data: Any, config: Any, seed: int) -> Loaders:
    """Batches of a training and a test set, see `data.loader`. UserError if the set is smaller than a batch."""
    return Loaders(
        train=partial(train_loader, data, config, seed),
        evaluate=partial(eval_loader, data, config),
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch(data, config),
    )


def first_images(loader: Callable[..., Iterable[Any]], name: str = "image") -> Callable[[], Tensor]:
    """The images of the whole first training batch, the same on all ranks, when they are asked for."""
    return lambda: next(iter(loader(start_step=0, steps=1, rank=0, world_size=1)))[name]


def log_notes(notes: Sequence[str]) -> None:
    """Say what was left out of a set or is missing from it."""
    for note in notes:
        _log.info(note)


def log_skipped(bad: Sequence[str]) -> None:
    """Say which images could not be read; nothing if all could."""
    if bad:
        some = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        _log.info(f"{len(bad)} images could not be read and were skipped: {some}")


def file_names(images: Any, index: Sequence[int]) -> list[str] | None:
    """File names of the images at these indices; None where an image has no file."""
    names = [getattr(images, "file_name", lambda _: None)(i) for i in index]
    return [name for name in names if name is not None] if None not in names else None


def load_inputs(run: RunFolder) -> InputSpec:
    """The input format and the class names of a run's model. UserError or OSError naming the file."""
    path = run.path / INPUTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has no images")
    content = read_json(path)
    try:
        return from_json(InputSpec, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_split(run: RunFolder) -> dict[str, list[str]] | None:
    """File names of the training and the test images of a run, where its set is a folder that it split itself.

    UserError naming the file if it holds anything but the names of files below a folder.
    """
    path = run.path / SPLIT
    if not path.is_file():
        return None
    split = read_json(path)
    for part in ("train", "test"):
        names = split.get(part)
        if not isinstance(names, list) or not all(map(_is_below, names)):
            raise UserError(f"{path}: {part} should be a list of CLASS/FILE names below data.root")
    return split


def _is_below(name: Any) -> bool:
    """Whether a name in a file from elsewhere is one of CLASS/FILE."""
    return isinstance(name, str) and "/" in name and not name.startswith("/") and ".." not in name.split("/")


def load_model_config(run: RunFolder, named: str = "") -> ModelConfig:
    """The model configuration of a run on images of any kind.

    UserError for a model that would be fetched, unless the user `named` this very one.
    """
    config: ModelConfig = _section(ModelConfig, run, "model")
    if config.name != named:
        check_local(config, run)
    return config


def load_data_config(run: RunFolder) -> DataConfig:
    """Which images a run folder was trained on."""
    return _section(DataConfig, run, "data")


def _section(kind: type[Any], run: RunFolder, name: str) -> Any:
    config = run.config()
    try:
        if not issubclass(job_type(str(config.get("kind"))), ImageJob):
            raise KeyError(name)
        return from_json(kind, config[name], name)
    except KeyError:
        raise UserError(f"{run.config_path} has no {name} of a run on images") from None
    except UserError as error:
        raise UserError(f"{run.config_path}: {error}") from error


def load_trained(
    run: RunFolder,
    checkpoint: Path | None = None,
    spec: InputSpec | None = None,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model of a run in evaluation mode, with its newest weights or those of `checkpoint`.

    `args`: other arguments of its experts, see `change_at_inference`. That of a pre-training has no classifier.
    """
    stored, args, spec = without_weights(load_model_config(run)), args or {}, spec or load_inputs(run)
    model = build_model(change_at_inference(stored, args), spec)
    if args:
        with torch.device("meta"):
            check_at_inference(build_model(stored, spec), model, args)
    if run.config().get("kind") == "pretrain":
        model.reset_classifier(0)  # type: ignore[operator]
    load_weights(model, checkpoint or run.path)
    return model.eval()


def samples(run: RunFolder, data: ImageData) -> Samples | None:
    """The test images that a report draws; None where they have no numbers, or none of them is there any more."""
    wanted = wanted_images(run.path)
    if isinstance(data.test, IterableDataset) or not wanted:
        return None
    places = _places(run, data.test, wanted)
    if len(places) < len(wanted):
        _log.warning("%s of the %s images that the report shows are gone", len(wanted) - len(places), len(wanted))
    if not places:
        return None
    try:
        batch = data.test.batch(list(places.values()))
    except BadImageError as error:
        _log.warning("the report of %s shows no images: %s", run.path, error)
        return None
    index = {place: number for number, place in places.items()}
    numbers = torch.tensor([index[place] for place in batch["index"].tolist()], dtype=torch.long)
    return Samples(batch["image"], batch["target"], numbers, data.spec.mean, data.spec.std) if len(numbers) else None


def image_source(data: ImageData, macs: int | None) -> ImageSource | None:
    """The test images for the report to look through; None for a stream, whose images have no numbers."""
    images: Any = data.test
    if isinstance(images, IterableDataset):
        return None

    def read(indices: Sequence[int]) -> Samples | None:
        readable = []
        for index in indices:
            try:
                readable.append(images.batch([index]))
            except BadImageError as error:
                _log.warning("the report does not show: %s", error)
        parts = [part for part in readable if len(part["index"])]
        if not parts:
            return None
        batch = {name: torch.cat([part[name] for part in parts]) for name in ("image", "target", "index")}
        return Samples(batch["image"], batch["target"], batch["index"], data.spec.mean, data.spec.std)

    return ImageSource(read, images_to_explore(len(images), macs), len(images), data.classes)


def own_images(folder: Path, spec: InputSpec, macs: int | None) -> ImageSource:
    """The pictures of a folder as a model takes them, called by their file names. FileNotFoundError if it has none."""
    files = find_images([folder])

    def read(indices: Sequence[int]) -> Samples | None:
        images = {}
        for index in indices:
            try:
                images[index] = spec.transform(read_image(files[index], spec.channels))
            except BadImageError as error:
                _log.warning("left out: %s", error)
        number = torch.tensor(list(images), dtype=torch.long)
        return Samples(torch.stack(list(images.values())), number, number, spec.mean, spec.std) if images else None

    names = [display_name(file.relative_to(folder) if folder.is_dir() else file.name) for file in files]
    return ImageSource(read, images_to_explore(len(files), macs), len(files), names)


def _places(run: RunFolder, images: Any, wanted: Sequence[int]) -> dict[int, int]:
    """Where the images of predictions.npz are in the test set now: by their files, which may have become fewer."""
    predictions, present = read_run(run.path).predictions, file_names(images, range(len(images)))
    if predictions is None or predictions.file is None or present is None:
        return {index: index for index in wanted if index < len(images)}
    files = dict(zip(predictions.index.tolist(), predictions.file, strict=True))
    place = {name: number for number, name in enumerate(present)}
    return {index: place[files[index]] for index in wanted if files[index] in place}


def export_backbone(config: ModelConfig, spec: InputSpec, run: RunFolder, target: Path) -> str:
    """Write the weights without a classifier; returns the lines of code that load them."""
    check_model_arguments(config)
    arguments: dict[str, Any] = {**config.args, "in_chans": spec.channels, "num_classes": 0}
    published = get_pretrained_cfg(config.name)
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = spec.image_size
    model = timm.create_model(config.name, **arguments)
    add_experts(model, as_stored(config.experts))
    load_weights(model, run.path, new_head=True)
    kept = model.state_dict()
    metadata = {"format": "pt", "model": config.name, "args": json.dumps(arguments)}
    if has_experts(config.experts):
        metadata["experts"] = json.dumps(sparsify_arguments(config.experts))
    write_file(kept, target, metadata)
    call = ", ".join([repr(config.name), *(f"{name}={value!r}" for name, value in arguments.items())])
    lines = [f"# {len(kept)} tensors", "import sparse_mlp, timm  # sparse_mlp registers its models with timm"]
    if has_experts(config.experts):
        lines += _loaded_with_experts(call, config, target)
    else:
        # The call that is returned has been made once.
        timm.create_model(config.name, checkpoint_path=str(target), **arguments)
        head = call.replace("num_classes=0", "num_classes=10, pretrained=True")
        overlay = f"pretrained_cfg_overlay={{'file': {str(target)!r}, 'num_classes': 0}}"
        lines += [
            f"timm.create_model({call}, checkpoint_path={str(target)!r})",
            "# with a new classifier:",
            f"timm.create_model({head}, {overlay})",
        ]
    if not config.final_norm:
        lines.append("# trained without its final norm: the same features with model.norm = torch.nn.Identity()")
    return "\n".join(lines)


def _loaded_with_experts(call: str, config: ModelConfig, target: Path) -> list[str]:
    experts = ", ".join(f"{name}={value!r}" for name, value in sparsify_arguments(config.experts).items())
    return [
        f"model = timm.create_model({call})",
        f"sparse_mlp.sparsify(model, {experts})",
        f"sparse_mlp.weights.load(model, {str(target)!r})",
    ]
