"""Load the weights of a file into a model, or raise an error that lists what does not fit."""

from __future__ import annotations

from pathlib import Path

from timm.models._features import FeatureGetterNet
from torch import nn

from sparse_mlp.weights.fit import add_batch_counters, check_fit, shapes
from sparse_mlp.weights.read import names_and_tensors


def load(model: nn.Module, path: Path, *, new_head: bool = False) -> None:
    """Put the weights of a file into `model`.

    Reads safetensors, torch files (without executing code), `.npz` (Google's Mixers, and what timm's own models read),
    the layouts that the model's checkpoint filter knows, and MoCo v3's own checkpoints, of which the encoder is taken;
    with wrappers and prefixes as `models._checkpoint.unwrap_checkpoint` takes them off. `new_head` keeps the model's
    own classifier, or its having none, where the file's is another. For a feature extractor (timm's `features_only`)
    the parts that it does without are left out.

    Raises `CheckpointMismatch`, a UserError with the lists of names, if they do not fit; UserError for a file that
    holds no weights; FileNotFoundError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    body = model.model if isinstance(model, FeatureGetterNet) else model
    stored, own = names_and_tensors(body, path), body.state_dict()
    if isinstance(model, FeatureGetterNet):
        stored = {name: value for name, value in stored.items() if name in own}
    kept = set()
    for name in classifier_names(body) if new_head else ():
        if name not in own:
            stored.pop(name, None)
        elif name not in stored or stored[name].shape != own[name].shape:
            stored[name] = own[name]
            kept.add(name)
    add_batch_counters(stored, shapes(own))
    actual, expected = (
        {name: shape for name, shape in shapes(state).items() if name not in kept} for state in (stored, own)
    )
    check_fit(actual, expected, f"the weights in {path} do not fit this model")
    body.load_state_dict(stored)


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the weights of a timm model's classifier; none for another model."""
    prefixes = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return [f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")]
