"""Recipes: a frozen dataclass for each kind of run; every field is a command-line option and is in config.json."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
import torch
import tyro

from sparse_mlp.engine import LENGTHS
from sparse_mlp.errors import UserError

R = TypeVar("R", bound="Recipe")
T = TypeVar("T")

_TOGETHER = ("model.args", "model.experts.args")
_LEARNING_RATES = (("optim", "lr"), ("schedule", "warmup_lr"), ("schedule", "min_lr"))


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`["top_k=(1, 2)", "act_layer=gelu"]` -> values as Python literals, or as text where they are none."""
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{text!r} is not of the form name=value")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[name] = value
        try:
            json.dumps(arguments[name], allow_nan=False)
        except (TypeError, ValueError):
            raise UserError(f"{text!r} is neither a finite number, text, true, false, a list nor a dict") from None
    return arguments


Arguments = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=parse_arguments,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={argument!r}" for name, argument in value.items()],
    ),
]
"""Keyword arguments of a model; on a command line `name=value name=value`, as timm's scripts have it."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts in the place of the model's MLPs, see `sparse_mlp.sparsify`."""

    blocks: int | str | None = None
    """Which blocks get experts: a number for the last ones, last-2, every-2, indices as 3,7 or names as blocks.3. None:
    none of them. Experts begin as the MLPs of the model, with its published weights or those of a file if given."""

    num_experts: int = 8
    """Experts of each MLP."""

    top_k: int = 1
    """How many of them an item goes to."""

    init: Literal["copy", "noise", "drop", "sample", "random"] = "copy"
    """What they begin as: the MLP; the MLP with noise, or a share of its neurons redrawn or left out; new weights."""

    strength: float | None = None
    """Of noise: in standard deviations of each weight, 0.01 if left out. Of drop and sample: the share of the neurons
    that are redrawn, or kept; 0.5 if left out."""

    router: Literal["random", "centroids"] = "random"
    """What routers begin as: random weights, or the centroids of what the MLPs get of the first training batch, as in
    cluster-aware upcycling (classification and pre-training). With these, sample draws neurons by their activation."""

    renormalize: bool = True
    """Gates that add up to 1, with which the model's answers are at first those of the dense one."""

    args: Arguments = field(default_factory=dict)
    """Further arguments of MoeMlp, for example: capacity_ratio=1.05 shared_experts=1."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: a model of timm's registry, ours included."""

    name: str = "sparse_mlp_t4_32"
    """Name of the model (sparse-mlp models lists them)."""

    args: Arguments = field(default_factory=dict)
    """Arguments of the model, for example: top_k=(1,1) sparse_blocks=4 drop_path_rate=0.1. They join the recipe's own.
    Image size, channels and classes come from the data."""

    pretrained: bool = False
    """Start from the weights that timm publishes for this name."""

    final_norm: bool = True
    """Keep the norm before the pooling and the classifier. Without a class token, features that MoCo v3 pre-trains are
    better probed without it (its table 4); what begins with such weights has to leave it out too."""

    weights: str | None = None
    """Start from the weights in this file (.safetensors, .pth, a published Mixer .npz, or a run folder); the head stays
    new where the classes are others."""

    optimizer_state: bool = False
    """Begin also with the state that the optimiser had in the run of `weights`, at its newest checkpoint: its moments
    and the number of its steps, not its learning rate. Each expert has that of the MLP it begins as (Sparse Upcycling,
    section 3); a router, and a classifier of other classes, begin without."""

    experts: ExpertsConfig = field(default_factory=ExpertsConfig)


@dataclass(frozen=True)
class InferenceConfig:
    """What may differ in a trained model when it is used."""

    args: Arguments = field(default_factory=dict)
    """Other arguments of the experts than the model was trained with: top_k=... (not more than then),
    eval_capacity_ratio=..., capacity_group=..., prioritized=True, renormalize=..., as the model or its experts take
    them."""


@dataclass(frozen=True)
class Recipe:
    """What the recipes of all kinds have in common. A kind that trains adds `optim`, `schedule` and `train`."""

    kind: ClassVar[str]
    """Name of the kind of run, as in `sparse_mlp.jobs`; config.json holds it."""

    name: str = "custom"
    """Name of the run folder where --out is not given."""


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as config.json holds it."""
    return {"kind": recipe.kind, **json.loads(json.dumps(dataclasses.asdict(recipe)))}


def from_json(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from its JSON value. UserError, with the nearest name, for an unknown field or a wrong value."""
    if isinstance(values, dict) and issubclass(kind, Recipe):
        values = {name: value for name, value in values.items() if name != "kind"}
    _check_names(kind, values, where)
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if "error" in first.get("ctx", {}):  # raised by a __post_init__
            raise UserError(str(first["ctx"]["error"])) from None
        name = ".".join([where, *map(str, first["loc"])]).strip(".")
        raise UserError(f"{name or 'the configuration'} is {first['input']!r}: {first['msg']}") from None


def differences(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two recipes differ, with both values."""
    one, two = (flatten(to_json(recipe)) for recipe in (first, second))
    return {
        name: (one.get(name), two.get(name)) for name in [*one, *(two.keys() - one)] if one.get(name) != two.get(name)
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configurations as dotted names -> values; a model's arguments stay together."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and prefix + name not in _TOGETHER:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def override(recipe: R, changes: Mapping[str, Any]) -> R:
    """The recipe with other values in some fields: `override(recipe, {"train": {"epochs": 2}, "name": "mine"})`.

    What depends on the changed fields follows, see `adjust_dependent`. UserError for an unknown field or a wrong value.
    """
    if changes.get("kind", recipe.kind) != recipe.kind:
        raise UserError(f"kind {changes['kind']!r} would be ignored: {recipe.name} is of the kind {recipe.kind!r}")
    return adjust_dependent(recipe, change_fields(recipe, changes))


def change_fields(given: T, changes: Mapping[str, Any]) -> T:
    """A dataclass with other values in some fields, of which dictionaries change the fields inside.

    UserError for an unknown field or a wrong value.
    """
    values = dataclasses.asdict(given)  # type: ignore[call-overload]
    for name, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **change}
        else:
            values[name] = dataclasses.asdict(change) if dataclasses.is_dataclass(change) else change  # type: ignore[arg-type]
    return from_json(type(given), json.loads(json.dumps(values, default=_plain)))


def _plain(value: Any) -> Any:
    """What JSON holds for a value of Python's: the name of a path or a device, the number of numpy's or torch's."""
    if isinstance(value, os.PathLike | torch.device):
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise UserError(f"{value!r} of type {type(value).__name__} cannot be a value of a recipe")


def adjust_dependent(default: R, given: R) -> R:
    """`given`, which is `default` with a user's changes, after the fields that depend on these are adjusted.

    - One of train.epochs, steps and minutes replaces the recipe's own.
    - Learning rates that were not given follow the batch size in proportion.
    - Model arguments join the recipe's as long as the model is the same, and are dropped with another model.
    """
    given = _adjust_length(default, given)
    given = _adjust_learning_rates(default, given)
    return _adjust_model_args(default, given)


def _adjust_length(default: R, given: R) -> R:
    train, before = getattr(given, "train", None), getattr(default, "train", None)
    changed = [name for name in LENGTHS if getattr(train, name, None) != getattr(before, name, None)]
    if train is None or len(changed) != 1 or getattr(train, changed[0]) is None:
        return given
    changes: Any = {"train": replace(train, **{name: None for name in LENGTHS if name != changed[0]})}
    return replace(given, **changes)


def _adjust_learning_rates(default: R, given: R) -> R:
    size, before = (getattr(getattr(recipe, "data", None), "batch_size", None) for recipe in (given, default))
    optim = getattr(given, "optim", None)
    if not size or not before or size == before or not optim or optim.lr != default.optim.lr:  # type: ignore[attr-defined]
        return given
    for part, name in _LEARNING_RATES:
        rate = getattr(getattr(default, part), name)
        if rate and getattr(getattr(given, part), name) == rate:
            given = replace(given, **{part: replace(getattr(given, part), **{name: rate * size / before})})
    return given


def _adjust_model_args(default: R, given: R) -> R:
    model, before = getattr(given, "model", None), getattr(default, "model", None)
    if not isinstance(model, ModelConfig) or not isinstance(before, ModelConfig):
        return given
    if model.name == before.name:
        args = {**before.args, **model.args}
    else:
        args = {} if model.args == before.args else model.args
    return replace(given, model=replace(model, args=args))  # type: ignore[call-arg]


def _check_names(kind: Any, values: Any, where: str) -> None:
    """UserError, with the nearest name, for a field that the dataclass does not have."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the configuration'} should be a JSON object, not {values!r}")
    fields, hints = [entry.name for entry in dataclasses.fields(kind)], typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise UserError(f"unknown field {prefix}{name}" + (f"; nearest: {prefix}{near[0]}" if near else ""))
        if dataclasses.is_dataclass(hints[name]):
            _check_names(hints[name], value, prefix + name)
