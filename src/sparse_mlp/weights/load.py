"""Weights of a file into a model, or an error that says what does not fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from torch import nn

from sparse_mlp.errors import UserError
from sparse_mlp.weights.moco import from_moco


def load(model: nn.Module, path: Path, *, new_head: bool = False) -> None:
    """Put the weights of a file into `model`.

    Reads safetensors, torch files (without executing code), Google's Mixer `.npz`, the layouts that the model's
    checkpoint filter knows, and MoCo v3's own checkpoints, of which the encoder is taken. `new_head` keeps the model's
    own classifier, or its having none, where the file's is another. ValueError listing matched, missing and unexpected
    names if they do not fit; FileNotFoundError if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    own = model.state_dict()
    found = _read(model, path)
    kept = set()
    for name in _classifier(model) if new_head else ():
        if name not in own:
            found.pop(name, None)
        elif name not in found or _differ(name, own, found):
            found[name] = own[name]
            kept.add(name)
    matched = [name for name in own if name in found and name not in kept and not _differ(name, own, found)]
    problems = {
        "missing": [name for name in own if name not in found],
        "unexpected": [name for name in found if name not in own],
        "of another shape": [name for name in own if name in found and _differ(name, own, found)],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names)
        raise UserError(f"the weights in {path} do not fit this model: {len(matched)} matched, {listed}")
    model.load_state_dict(found)


def _read(model: nn.Module, path: Path) -> dict[str, Any]:
    """Names and tensors of a file, as `model` names them."""
    try:
        if path.suffix == ".npz" and hasattr(model, "load_pretrained"):
            model.load_pretrained(str(path))  # type: ignore[operator]
            return model.state_dict()
        found = load_state_dict(str(path), device="cpu", weights_only=True)
    # A damaged or foreign file fails in as many ways as there are formats: pickle, zip, safetensors, missing keys.
    except Exception as error:
        reason = re.split(r"\. |\n", str(error) or type(error).__name__)[0]
        raise UserError(f"{path} holds no weights that can be read: {reason}") from error
    found = from_moco(found)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(adapt(found, model) if adapt else found)


def _classifier(model: nn.Module) -> list[str]:
    """Names of the classifier's weights."""
    prefixes = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return [f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")]


def _differ(name: str, first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first[name].shape != second[name].shape


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
