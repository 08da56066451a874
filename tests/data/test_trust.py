"""Ways in which the settings of a run, or a file beside the data, could make a program run or fetch something."""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import CIFAR10

from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets, check_trusted, is_remote
from sparse_mlp.errors import UserError


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """A file that exists once a command has run."""
    return tmp_path / "touched"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def build(trusted: bool = False, **settings) -> Any:
    return build_datasets(DataConfig(**({"num_classes": 2} | settings)), AugmentConfig(), trusted=trusted)


@pytest.mark.parametrize("root", ["pipe:touch {}; #", " pipe:touch {} #", "PIPE:touch {}; #", "pi\tpe:touch {}; #"])
@pytest.mark.parametrize("split", ["train", "a-{{0..1}}.tar|3"])
def test_a_root_that_is_a_command_does_not_run(touched: Path, root: str, split: str):
    pytest.importorskip("webdataset")
    with pytest.raises(UserError, match=r"is an address or a program, not a folder; .* name it on the command line"):
        build(name="wds/x", root=root.format(touched), train_split=split, test_split=split)
    assert not touched.exists()


def test_a_root_that_was_named_runs(touched: Path):
    """The check above would notice."""
    pytest.importorskip("webdataset")
    with pytest.raises(ValueError):
        build(name="wds/x", root=f"pipe:touch {touched}; #", trusted=True)
    assert touched.exists()


@pytest.mark.parametrize(
    "address", ["https://a.example/x", "http://a.example", "s3://x", "gs://x", "hf://x", "file:///tmp", "ftp://x"]
)
@pytest.mark.parametrize("name", ["wds/x", "WDS/x", "tfds/mnist", "hfds/x"])
def test_addresses_are_not_opened(name: str, address: str):
    with pytest.raises(UserError, match="name it on the command line"):
        build(name=name, root=address)


@pytest.mark.parametrize("name", ["hfds/some/set", "HFDS/some/set", "hfids/some/set", "tfds/some_set"])
def test_sets_that_are_fetched_or_bring_code_are_not_opened(name: str, monkeypatch: pytest.MonkeyPatch):
    """Not even their packages are imported."""

    class Bomb(types.ModuleType):
        def __getattr__(self, attribute: str) -> Any:
            raise AssertionError(f"{self.__name__}.{attribute} was used")

    for package in ("datasets", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, package, Bomb(package))
    with pytest.raises(UserError, match=f"data.name '{name}' is fetched from elsewhere; .*--data.name {name}"):
        build(name=name)
    with pytest.raises(UserError):
        check_trusted(DataConfig(name=name))


def shards(folder: Path, *, names: list[str] | None = None, **info: Any) -> Path:
    """One empty shard; `_info.json` lists `names`."""
    with tarfile.open(folder / "a.tar", "w"):
        pass
    split = {"name": "train", "num_samples": 3, "filenames": names or ["a.tar"], "shard_lengths": [3]} | info
    split = {key: value for key, value in split.items() if value is not None}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split, "validation": split}}))
    return folder


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "name", ["pipe:touch {}", "https://a.example/a.tar", "/etc/passwd", "../a.tar", "x/../../a.tar"]
)
def test_a_list_of_shards_names_nothing_outside_its_folder(tmp_path: Path, touched: Path, name: str, trusted: bool):
    pytest.importorskip("webdataset")
    root = tmp_path / "set"
    root.mkdir()
    shards(root, names=[name.format(touched)])
    with pytest.raises(UserError, match="is not a file inside that folder"):
        build(name="wds/x", root=str(root), trusted=trusted)
    assert not touched.exists()


@pytest.mark.parametrize("split", ["pipe:touch {}.tar", "::pipe:touch {}.tar::a.tar", "a.tar::../b.tar"])
def test_a_split_names_nothing_outside_its_folder(tmp_path: Path, touched: Path, split: str):
    pytest.importorskip("webdataset")
    with pytest.raises((UserError, FileNotFoundError), match=r"shard|split"):
        build(name="wds/x", root=str(shards(tmp_path)), train_split=split.format(touched), num_samples=3)
    assert not list(tmp_path.glob("touched*"))


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: pipe(root / "a.tar"), "a.tar is not there, or not a regular file"),
        (lambda root: pipe(root / "_info.json"), "_info.json is not a regular file"),
        (lambda root: (root / "a.tar").unlink(), "a.tar is not there, or not a regular file"),
        (lambda root: shards(root, num_samples=None), "its description lacks 'num_samples'"),
        (lambda root: shards(root, filenames=None), "its description lacks 'filenames'"),
        (lambda root: shards(root, num_samples=0), "num_samples"),
        (lambda root: shards(root, filenames=[1]), "shard"),
        (lambda root: shards(root, filenames=3), "timm cannot open"),
        (lambda root: (root / "_info.json").write_text("[1"), "split train not found"),
        (lambda root: (root / "_info.json").write_text("[1]"), "timm cannot open|split train not found"),
        (lambda root: (root / "_info.json").write_text('{"splits": {"train": 3}}'), "timm cannot open"),
    ],
)
def test_shards_that_are_not_whole_are_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str):
    pytest.importorskip("webdataset")
    root = shards(tmp_path)
    damage(root)
    with pytest.raises((UserError, FileNotFoundError), match=message) as error:
        build(name="wds/x", root=str(root))
    assert "\n" not in str(error.value)


def test_a_folder_of_shards_that_is_not_there(tmp_path: Path):
    pytest.importorskip("webdataset")
    with pytest.raises(FileNotFoundError, match="missing is not a folder of shards"):
        build(name="wds/x", root=str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "torch/cifar10", "torch/mnist"])
def test_settings_alone_download_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises((UserError, FileNotFoundError)) as error:
        build(name=name, root=str(tmp_path), num_classes=None, download=True)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.gz"))


class Touch:
    """What its pickle runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["cifar10", "torch/cifar10"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_pickle_in_the_place_of_cifar_is_not_loaded(tmp_path: Path, touched: Path, name: str, trusted: bool):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for file in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / file).write_bytes(pickle.dumps(Touch(touched)))
    (folder / "batches.meta").write_bytes(pickle.dumps(Touch(touched)))
    with pytest.raises((UserError, FileNotFoundError)):
        build(name=name, root=str(tmp_path), num_classes=None, trusted=trusted)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("pipe:ls", True), ("local-dir:/tmp/x", True), ("hf-hub:timm/x", True), ("hf_hub:timm/x", True),
        ("https://a.example", True), ("-", True), ("s3://x", True), ("PIPE:ls", True), ("pi\npe:ls", True),
        ("photos", False), ("/data/a b", False), ("C:\\photos", False), ("cycle_mlp_b1", False), ("", False),
        ("./pipe:ls", False), ("hf/x", False),
    ],
)  # fmt: skip
def test_is_remote(name: str, remote: bool):
    assert is_remote(name) is remote


@pytest.mark.parametrize("name", ["digits", "cifar10", "folder", "torch/cifar10", "wds/x"])
def test_sets_that_lie_here_need_no_trust(name: str):
    check_trusted(DataConfig(name=name, root=None if name == "digits" else "photos"))
