"""Checkpoints that are whole or not there.

A checkpoint is a folder `step_00001234`:
    state/*.safetensors      everything training needs, written by torch.distributed.checkpoint (any number of ranks)
    state.json               step, counters, the optimiser's numbers, and size and checksum of every other file
    model.safetensors        weights of the bare model; model_ema.safetensors its moving average
It is written under a temporary name and renamed when all of it is on the disk. Nothing in it is executed on loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sparse_mlp.distributed import is_main, on_main
from sparse_mlp.engine.errors import CheckpointError
from sparse_mlp.errors import UserError

_NAME = re.compile(r"step_(\d{8,})")
_FORMAT = 1


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, None if there is none."""
    return next(reversed(list_checkpoints(folder)), None)


def checkpoint_step(path: Path) -> int:
    """Number of updates after which the checkpoint was made, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} is not named like a checkpoint (step_00001234)")
    return int(match.group(1))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint and drop all but the newest `keep`; collective. Returns its folder.

    `tensors` is what `load_tensors` puts back, `weights` a file name -> tensors to export, `state` goes through JSON.
    Raises CheckpointError if anything cannot be written; older checkpoints are then untouched.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        on_main(lambda: _make_empty(temporary))
        _quietly(
            dcp.save,
            _apart(tensors),
            storage_writer=HuggingFaceStorageWriter(str(temporary / "state"), save_distributed=True),
        )
        on_main(lambda: _complete(temporary, final, weights, state))
    except (Exception, CheckpointException) as error:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        last = last_checkpoint(folder)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"could not save {final}: {_reason(error)}; {kept}") from error
    on_main(lambda: _prune(folder, keep))
    return final


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, after every file in it has been compared with its checksum.

    Raises CheckpointError that names the damaged file and the checkpoint before it.
    """
    try:
        record = json.loads((path / "state.json").read_text())
        if record["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {record['format']}; this version reads {_FORMAT}")
        state, files, checksum = record["state"], record["files"], record["checksum"]
    except FileNotFoundError:
        raise _damaged(path, "state.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"state.json cannot be read ({_reason(error)})") from None
    if checksum != _checksum_json(state, files):
        raise _damaged(path, "state.json does not match its checksum")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != size or _checksum(file) != digest:
            raise _damaged(path, f"{name} does not match its checksum")
    return state


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place; collective. CheckpointError lists missing, unexpected and misshapen names."""
    reader = HuggingFaceStorageReader(str(path / "state"))
    there = {
        name: tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(wanted.keys() - there.keys()),
        "unexpected": sorted(there.keys() - wanted.keys()),
        "of another shape": sorted(name for name in wanted.keys() & there.keys() if wanted[name] != there[name]),
    }
    if any(problems.values()):
        matched = len(wanted.keys() & there.keys()) - len(problems["of another shape"])
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{path} does not fit this model and optimiser: {matched} tensors match; {listed}")
    try:
        _quietly(dcp.load, tensors, storage_reader=reader)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def clean(folder: Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _make_empty(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / "state").mkdir(parents=True)


def _complete(
    temporary: Path, final: Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    for name, named in weights.items():
        exported = {key: tensor.detach().cpu() for key, tensor in named.items()}
        save_file(_apart(exported), temporary / name, metadata={"format": "pt"})
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {str(path.relative_to(temporary)): [path.stat().st_size, _checksum(path)] for path in paths}
    record = {"format": _FORMAT, "state": state, "files": files, "checksum": _checksum_json(state, files)}
    (temporary / "state.json").write_text(json.dumps(record, indent=1, allow_nan=False))
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    if final.exists():  # a damaged one of the same step
        _remove(final)
    temporary.replace(final)
    _sync(final.parent)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with no memory in common, as safetensors wants them: tied weights are written twice."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        where = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if where in seen else tensor
        seen.add(where)
    return result


def _prune(folder: Path, keep: int) -> None:
    for path in list_checkpoints(folder)[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    # Renamed first: whoever lists the folder meanwhile never sees half a checkpoint.
    shutil.rmtree(path.replace(path.with_name(f".{path.name}.old.tmp")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_json(state: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([state, files], sort_keys=True).encode()).hexdigest()


def _quietly(function: Any, *arguments: Any, **options: Any) -> None:
    # torch warns that a process without a group saves alone, which is what is meant.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        function(*arguments, **options)


def _reason(error: BaseException) -> str:
    """What went wrong in one line, without the traceback that torch packs into its messages."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _damaged(path: Path, what: str) -> CheckpointError:
    before = [other for other in list_checkpoints(path.parent) if checkpoint_step(other) < checkpoint_step(path)]
    advice = f"; remove that folder to go on from {before[-1].name}" if before else "; there is no earlier one"
    return CheckpointError(f"checkpoint {path} is damaged: {what}{advice}")


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def split_tensors(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state dict without its tensors, which go to `tensors` under dotted names; lists and dicts stay."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"tensor": prefix}
    if isinstance(tree, dict):
        return {key: split_tensors(value, f"{prefix}.{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [split_tensors(value, f"{prefix}.{i}", tensors) for i, value in enumerate(tree)]
    return tree


def join_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tensors` (tuples come back as lists)."""
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"}:
            return tensors[tree["tensor"]]
        return {key: join_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join_tensors(value, tensors) for value in tree]
    return tree
