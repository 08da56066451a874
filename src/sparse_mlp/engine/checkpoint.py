"""Atomic checkpoints.

A checkpoint is a folder `step_00001234`:
    state/*.safetensors      the training state, written by torch.distributed.checkpoint (any number of ranks)
    state.json               step, counters, the optimiser's numbers, and size and checksum of every other file
    model.safetensors        weights of the bare model; model_ema.safetensors their moving average
It is written under a temporary name and renamed when all of it is on the disk. Loading executes nothing from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sparse_mlp.distributed import is_main, on_main, own_part
from sparse_mlp.engine.consolidate import consolidate, quietly
from sparse_mlp.engine.errors import CheckpointError
from sparse_mlp.errors import UserError
from sparse_mlp.weights import CheckpointMismatch, check_fit

_NAME = re.compile(r"step_(\d{8,})")
_FORMAT = 2


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, None if there is none."""
    return next(reversed(list_checkpoints(folder)), None)


def checkpoint_step(path: Path) -> int:
    """Number of updates before the checkpoint was written, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} is not named like a checkpoint (step_00001234)")
    return int(match.group(1))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Mapping[str, str]],
    state: Mapping[str, Any],
    keep: int,
    group: ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint and delete all but the newest `keep`; collective. Returns its folder.

    `tensors` are for `load_tensors`; `weights` maps names of files to what they export, names of tensors in the file ->
    in `tensors`; `state` is stored as JSON. `group`: of all ranks, the default one if left out. Raises CheckpointError
    if anything cannot be written; older checkpoints then stay as they are.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        on_main(lambda: _create_empty(temporary), group)
        quietly(
            dcp.save,
            _without_shared_storage(tensors),
            storage_writer=HuggingFaceStorageWriter(str(temporary / "state"), save_distributed=True),
            process_group=group,
        )
        on_main(lambda: _finalize(temporary, final, weights, state), group)
    except (Exception, CheckpointException) as error:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        last = last_checkpoint(folder)
        previous = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"could not save {final}: {_reason(error)}; {previous}") from error
    on_main(lambda: _prune(folder, keep), group)
    return final


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, after every file has been compared with its checksum.

    Raises CheckpointError that names the damaged, missing or additional file and the checkpoint before it.
    """
    try:
        record = json.loads((path / "state.json").read_text())
        if record["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {record['format']}; this version reads {_FORMAT}")
        state, files, checksum = record["state"], record["files"], record["checksum"]
    except FileNotFoundError:
        raise _damaged(path, "state.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"state.json cannot be read ({_reason(error)})") from None
    if checksum != _checksum_json(state, files):
        raise _damaged(path, "state.json does not match its checksum")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != size or _checksum(file) != digest:
            raise _damaged(path, f"{name} does not match its checksum")
    # Every file of state/ is read on resume, and an additional model_ema.safetensors would be taken for the weights.
    for file in sorted((*path.glob("state/**/*"), *path.glob("*.safetensors"))):
        name = file.relative_to(path).as_posix()
        if name not in files and not file.is_dir():
            raise _damaged(path, f"{name} is not one of the files it was saved with")
    return state


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place; collective. CheckpointError lists missing and unexpected names and wrong shapes."""
    stored = {name: tuple(entry.size) for name, entry in _stored_tensors(path).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        check_fit(stored, expected, f"{path} does not fit this model and optimiser")
    except CheckpointMismatch as error:
        raise CheckpointError(str(error)) from None
    _fill(path, tensors)


def load_optimizer(path: Path, numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The optimiser's state by name of the parameter; collective. `numbers`: what `load_state` has of the learner."""
    stored = {name: entry for name, entry in _stored_tensors(path).items() if name.startswith("optimizer.")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    _fill(path, tensors)
    return join_tensors(numbers["optimizer"], tensors)["state"]


def _stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Names, shapes and types of the tensors in a checkpoint's training state."""
    try:
        metadata = _reader(path).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a header can declare: safetensors, JSON and torch each raise their own
        raise _damaged(path, f"state cannot be read ({_reason(error)})") from None
    return {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _fill(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        quietly(dcp.load, tensors, storage_reader=_reader(path))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error


def _reader(path: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(path / "state"))


def clean(folder: Path) -> None:
    """Delete the temporary folders of interrupted saves."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _create_empty(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / "state").mkdir(parents=True)


def _finalize(temporary: Path, final: Path, weights: Mapping[str, Mapping[str, str]], state: Mapping[str, Any]) -> None:
    for name, exported in weights.items():
        consolidate(temporary / "state", exported, temporary / name)
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {str(path.relative_to(temporary)): [path.stat().st_size, _checksum(path)] for path in paths}
    record = {"format": _FORMAT, "state": state, "files": files, "checksum": _checksum_json(state, files)}
    (temporary / "state.json").write_text(json.dumps(record, indent=1, allow_nan=False))
    for path in (*temporary.rglob("*"), temporary):
        _fsync(path)
    if final.exists():  # a damaged one of the same step
        _remove(final)
    temporary.replace(final)
    _fsync(final.parent)


def _without_shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors requires: tied weights are written twice."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        address = own_part(tensor).untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def _prune(folder: Path, keep: int) -> None:
    for path in list_checkpoints(folder)[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    # Renamed first, so that a process that lists the folder meanwhile sees no incomplete checkpoint.
    shutil.rmtree(path.replace(path.with_name(f".{path.name}.old.tmp")))


def _fsync(path: Path) -> None:
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


def _reason(error: BaseException) -> str:
    """The cause of an error in one line, without the traceback that torch includes in its messages."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _damaged(path: Path, what: str) -> CheckpointError:
    before = [other for other in list_checkpoints(path.parent) if checkpoint_step(other) < checkpoint_step(path)]
    advice = f"; remove that folder to go on from {before[-1].name}" if before else "; there is no earlier one"
    return CheckpointError(f"checkpoint {path} is damaged: {what}{advice}")


def split_tensors(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state dict whose tensors are moved to `tensors` under dotted names and replaced by these names."""
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
