"""From a model's configuration to the model, with its weights."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from sparse_mlp import weights
from sparse_mlp.data import InputSpec, is_remote
from sparse_mlp.engine import RunFolder, Trainer
from sparse_mlp.errors import UserError
from sparse_mlp.jobs.experts import add_experts, as_stored, check_experts, has_experts
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.models import registered_names
from sparse_mlp.tasks.features import skip_final_norm

_log = logging.getLogger(__name__)

_FROM_DATA = ("img_size", "in_chans", "num_classes")
_FIELDS = {
    "checkpoint_path": "model.weights",
    "pretrained": "model.pretrained",
    "pretrained_cfg": "model.pretrained",
    "pretrained_cfg_overlay": "model.pretrained",
}  # arguments with a field of their own
_SAME_NEURONS = ("copy", "noise")  # starts of experts whose weights are those of the MLP, one by one
_RATES = ("drop_rate", "proj_drop_rate", "drop_path_rate")  # timm's names, the same for all models


def build_model(config: ModelConfig, spec: InputSpec, images: Callable[[], Tensor] | None = None) -> nn.Module:
    """The timm model for images as `spec` describes them, after a trial forward pass.

    `images` gives some of them, (B, C, H, W), for experts that begin with what the model makes of these.
    UserError, one line, for an unknown name (with the nearest ones), arguments the model does not take, an image size
    it cannot have, or weights that do not fit.
    """
    check_model_name(config.name)
    check_model_arguments(config)
    arguments = dict(config.args) | {"in_chans": spec.channels, "num_classes": len(spec.classes)}
    published = get_pretrained_cfg(config.name)
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = spec.image_size
    try:
        with warnings.catch_warnings():  # an image smaller than a patch: said below, in one line
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
            model = timm.create_model(config.name, pretrained=config.pretrained, **arguments)
        _check_forward(model, config.name, spec)
    except UserError:
        raise
    except OSError as error:
        raise OSError(f"model {config.name}: {_explain(error, config.name)}") from error
    # Models differ in what they raise for an argument that they cannot use.
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"model {config.name}: {_explain(error, config.name)}") from error
    if not config.final_norm:
        skip_final_norm(model)
    load_start(model, config, images)
    return model


def load_start(model: nn.Module, config: ModelConfig, images: Callable[[], Tensor] | None = None) -> None:
    """Give a dense model the weights that it starts from, and its experts: these begin as its MLPs, unless the weights
    are of a model that had them already."""
    path = None if config.weights is None else weights_file(Path(config.weights))
    sparse = path is not None and has_experts(config.experts) and weights.have_experts(path)
    if sparse:
        if config.experts.router != "random":
            raise UserError(f"model.experts.router {config.experts.router} would be ignored: {path} has routers")
        add_experts(model, config.experts)
    if path is not None:
        load_weights(model, path, new_head=True)
    if not sparse:
        add_experts(model, config.experts, images)


def check_model_arguments(config: ModelConfig) -> None:
    """UserError for arguments that come from the data, that open other weights, or that are out of range."""
    given = [name for name in _FROM_DATA if name in config.args]
    if given:
        raise UserError(f"model.args {given[0]}={config.args[given[0]]!r} cannot be set: it comes from the data")
    for name, value in config.args.items():
        if name in _FIELDS:
            raise UserError(f"model.args {name}={value!r} is not an argument of the model: use --{_FIELDS[name]}")
        if name in _RATES and not (isinstance(value, int | float) and 0 <= value < 1):
            raise UserError(f"model.args {name}={value!r} is not a share in [0, 1)")
    check_experts(config.experts)
    if config.optimizer_state:
        _check_optimizer_state(config)


def _check_optimizer_state(config: ModelConfig) -> None:
    """UserError unless the model begins with the weights of a run, and its experts with the weights of its MLPs."""
    if config.weights is None or not _is_run(Path(config.weights)):
        given = "is not given" if config.weights is None else f"{config.weights} is none"
        raise UserError(f"model.optimizer_state needs a run folder as model.weights, which {given}")
    if config.experts.init not in _SAME_NEURONS:
        allowed = " or ".join(_SAME_NEURONS)
        raise UserError(
            f"model.optimizer_state is of the dense weights: model.experts.init must be {allowed}, "
            f"not {config.experts.init}"
        )


def begin_optimizer(trainer: Trainer, config: ModelConfig) -> None:
    """Give a new run's optimiser the state of the run that its model begins with, if the configuration says so."""
    if not config.optimizer_state:
        return
    assert config.weights is not None
    carried, new = trainer.begin_with_optimizer_of(RunFolder.open(config.weights))
    _log.info(f"the optimiser begins with the state of {config.weights} for {carried} weights, without one for {new}")


def without_weights(config: ModelConfig) -> ModelConfig:
    """A model's configuration without the weights, and the state, that it started from."""
    return replace(config, pretrained=False, weights=None, optimizer_state=False, experts=as_stored(config.experts))


def model_to_start(config: ModelConfig, run: RunFolder | None, trusted: bool) -> ModelConfig:
    """The model to build: of a run with a checkpoint without the weights that it started from.

    UserError for a model or weights that would be fetched because a run folder names them.
    """
    if run is None:
        return config
    if run.has_checkpoint():
        config = without_weights(config)
    if not trusted and (is_remote(config.name) or config.pretrained):
        what = "model" if is_remote(config.name) else "published weights"
        raise UserError(f"{run.path} names the {what} of {config.name!r}, to be fetched: --trust-data allows it")
    return config


def check_local(config: ModelConfig, run: RunFolder) -> None:
    """UserError for a model that would be fetched because a run folder names it."""
    if is_remote(config.name):
        raise UserError(f"{run.path} names the model {config.name!r}, which would be fetched: give it as --model.name")


def load_model(config: ModelConfig, spec: InputSpec, path: Path) -> nn.Module:
    """A trained model, in evaluation mode: the architecture of `config` with the weights of a file or a run folder."""
    model = build_model(without_weights(config), spec)
    load_weights(model, path)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, *, new_head: bool = False) -> None:
    """`weights.load`, from a file or from a run folder."""
    weights.load(model, weights_file(Path(path)), new_head=new_head)


def weights_file(path: Path) -> Path:
    """The file of weights that a path names: itself, or the newest one of a run folder."""
    return RunFolder.open(path).weights() if _is_run(path) else path


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file()


def _nearest_models(name: str) -> list[str]:
    """Model names like this one, ours before timm's."""
    near = difflib.get_close_matches(name, registered_names(), n=3, cutoff=0.6)
    return near + [
        model for model in difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6) if model not in near
    ]


def check_model_name(name: str) -> None:
    """UserError with the nearest names if timm has no model of this name, or no weights of its tag."""
    if ":" in name:  # hf-hub:..., local-dir:...
        return
    if timm.is_model(name):
        _check_tag(name)
        return
    near = _nearest_models(name)
    hint = f"; nearest: {', '.join(near[:3])}" if near else ""
    raise UserError(f"unknown model {name!r}{hint} (`sparse-mlp models --all` lists every name)")


def _check_tag(name: str) -> None:
    """UserError with the tags that there are for one that timm does not know, as in resnet18.a1_in1k."""
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        model = name.split(".")[0]
        known = ", ".join(timm.list_pretrained(f"{model}.*")) or f"{model} alone: it has no published weights"
        raise UserError(f"unknown weights {name!r}; known: {known}") from None


@torch.no_grad()
def _check_forward(model: nn.Module, name: str, spec: InputSpec) -> None:
    """Run one black image through the model, so that an error comes before the training begins."""
    for layer in model.modules():
        if isinstance(layer, PatchEmbed) and any(spec.image_size % side for side in layer.patch_size):
            patch = layer.patch_size[0]
            raise UserError(f"model {name}: image size {spec.image_size} is not divisible by its patch size {patch}")
    training = model.training
    logits = model.eval()(torch.zeros(1, spec.channels, spec.image_size, spec.image_size))
    model.train(training)
    if logits.shape != (1, len(spec.classes)):
        raise UserError(f"model {name} gives {tuple(logits.shape)} for an image of one of {len(spec.classes)} classes")


def _explain(error: Exception, name: str) -> str:
    """The first line of an error of timm's or torch's; for an unknown argument with the nearest ones."""
    message = (str(error) or type(error).__name__).splitlines()[0]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    if unknown is None:
        return message
    with torch.device("meta"):
        kinds = [kind for kind in type(timm.create_model(name)).__mro__ if issubclass(kind, nn.Module)]
    known = {
        parameter.name
        for kind in kinds
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in _FROM_DATA
    }
    near = difflib.get_close_matches(unknown[1], sorted(known), n=3)
    return f"unknown argument {unknown[1]!r}" + (f"; nearest: {', '.join(near)}" if near else "")
