"""What a run is: one frozen dataclass, every field a command-line option and a line of the run's config.json."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union

import tyro

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.tasks.classify import ClassifyConfig


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`["top_k=(1, 2)", "act_layer=gelu"]` -> values as Python literals, or as text where they are none."""
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{text!r} is not of the form name=value")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
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


@dataclass(frozen=True)
class Recipe:
    """A complete configuration of a training run."""

    name: str = "custom"
    """What the run folder is called if --out does not say."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    task: ClassifyConfig = field(default_factory=ClassifyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as config.json holds it."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def from_json(values: Any) -> Recipe:
    """The inverse of `to_json`. ValueError, with the nearest name, for a field that is unknown or has a wrong value."""
    return decode(Recipe, values)


def differences(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two recipes differ, with both values."""
    one, two = (_flatten(to_json(recipe)) for recipe in (first, second))
    return {
        name: (one.get(name), two.get(name)) for name in [*one, *(two.keys() - one)] if one.get(name) != two.get(name)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "model.args":
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def decode(kind: Any, value: Any, where: str = "") -> Any:
    """A JSON value as the annotated type; only lists become tuples, and whole numbers floats. ValueError else."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return decode(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return decode(option, value, where)
            except ValueError as error:
                failure = error
        raise failure
    if origin is Literal:
        fits = value in arguments
    elif origin is tuple and isinstance(value, list):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(decode(item, entry, where) for item, entry in zip(inner, value, strict=True))
        fits = False
    elif kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif kind is type(None):
        fits = value is None
    else:
        fits = type(value) is (origin or kind)
    if not fits:
        raise UserError(f"{where} is {value!r}, which is not of the kind {getattr(kind, '__name__', None) or kind}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where or 'the configuration'} should be a JSON object, not {value!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [entry.name for entry in dataclasses.fields(kind)]
    prefix = f"{where}." if where else ""
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(f"unknown field {prefix}{name}" + (f"; nearest: {prefix}{near[0]}" if near else ""))
    return kind(**{name: decode(hints[name], entry, prefix + name) for name, entry in value.items()})
