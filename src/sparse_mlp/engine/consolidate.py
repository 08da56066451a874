"""One safetensors file from a checkpoint of any number of ranks, without holding all of it in memory."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

BUFFER = 256 * 2**20
"""Bytes that are read at a time; a larger tensor is read alone."""

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def consolidate(state: Path, names: Mapping[str, str], target: Path, buffer: int = BUFFER) -> None:
    """Write the tensors of a folder of shards as one safetensors file; `names` are those in the file -> in the folder.

    Reads at most `buffer` bytes at a time, or one tensor, and needs at most twice as much memory. KeyError for a name
    that the folder does not have.
    """
    reader = HuggingFaceStorageReader(str(state))
    stored: Any = reader.read_metadata().state_dict_metadata
    empty = {
        name: torch.empty(stored[source].size, dtype=stored[source].properties.dtype, device="meta")
        for name, source in names.items()
    }
    # in safetensors' order, in which everything is aligned
    empty = dict(sorted(empty.items(), key=lambda entry: (-entry[1].itemsize, entry[0])))
    with target.open("wb") as file:
        _write_header(file, empty)
        for part in _parts(empty, buffer):
            _copy(file, reader, {names[name]: torch.empty_like(empty[name], device="cpu") for name in part})


def _copy(file: BinaryIO, reader: HuggingFaceStorageReader, tensors: dict[str, Tensor]) -> None:
    quietly(dcp.load, dict(tensors), storage_reader=reader, no_dist=True)
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)


def quietly(function: Any, *arguments: Any, **options: Any) -> None:
    """Call a function of torch.distributed.checkpoint, which warns that it takes one process for all there is."""
    # for good: a filter set for a while would race with the other threads
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    function(*arguments, **options)


def _write_header(file: BinaryIO, empty: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in empty.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _parts(empty: Mapping[str, Tensor], buffer: int) -> Iterator[list[str]]:
    """Names of tensors that together have at most `buffer` bytes, or of a larger one."""
    part, size = list[str](), 0
    for name, tensor in empty.items():
        if part and size + tensor.nbytes > buffer:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    if part:
        yield part
