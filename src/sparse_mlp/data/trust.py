"""Data sets that the configuration of a run folder may not open: those that are fetched or can execute code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from sparse_mlp.data.config import DataConfig
from sparse_mlp.data.decode import display_name
from sparse_mlp.errors import UserError

_FETCHED = ("hfds/", "hfids/", "tfds/")
_OPENED_BY_ADDRESS = ("wds/", *_FETCHED)


def is_remote(name: str) -> bool:
    """Whether a name is fetched or executed rather than looked up here: pipe:, https:, hf-hub:, local-dir:..."""
    # urlparse is what webdataset goes by; timm also takes hf_hub:, which is no scheme to it. C: is a drive.
    return name == "-" or len(urlparse(name).scheme) > 1 or re.match(r"\w[\w+.-]+:", name) is not None


def check_trusted(data: DataConfig) -> None:
    """UserError for a set that is fetched or that can run a program: it is opened only where a command line names it.

    Sets of Hugging Face and of tensorflow_datasets are looked up elsewhere and may bring code; webdataset runs the rest
    of a root that begins with `pipe:`. `data.download` is no such setting: without trust nothing is fetched.
    """
    name = data.name.lower()
    advice = "a run's settings may not do that: name it on the command line"
    if name.startswith(_FETCHED):
        raise UserError(f"data.name {data.name!r} is fetched from elsewhere; {advice} (--data.name {data.name})")
    if data.root is not None and is_remote(data.root) and name.startswith(_OPENED_BY_ADDRESS):
        shown = display_name(data.root)
        raise UserError(f"data.root {shown!r} is an address or a program, not a folder; {advice} (--data.root)")


def check_shards(root: str, reader: Any) -> None:
    """UserError, FileNotFoundError for shards, named by a split or by _info.json, that are not files in the folder.

    The list of shards comes with the shards: it may not point elsewhere even where the folder itself is trusted.
    """
    for name in reader.split_info.filenames:
        if not isinstance(name, str):
            raise UserError(f"shard {name!r} of {display_name(root)} is not a name")
        joined = os.path.join(root, name)  # noqa: PTH118 - as webdataset's reader joins them
        if is_remote(name) or is_remote(joined) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"shard {display_name(name)!r} of {display_name(root)} is not a file inside that folder")
        if not Path(joined).is_file():
            raise FileNotFoundError(f"shard {display_name(joined)} is not there, or not a regular file")


def check_info(root: str) -> None:
    """FileNotFoundError, UserError for a webdataset folder that is not there or whose _info.json is not a file."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root {display_name(root)} is not a folder of shards")
    for name in ("_info.json", "info.json", "_info.yaml", "info.yaml"):
        path = Path(root) / name
        if path.exists() and not path.is_file():
            raise UserError(f"{display_name(path)} is not a regular file")
