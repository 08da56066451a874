"""How the C library is built, kept, and found to be damaged. In another cache, as in a new home."""

from __future__ import annotations

import logging
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_mlp.moe import MoeMlp, kernels
from sparse_mlp.moe.kernels import library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not library.find_compiler(), reason="no C compiler here, or not Linux"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield tmp_path / "cache" / "sparse_mlp"
    library.load.cache_clear()


def again() -> str:
    """The state in a new process, as it were."""
    library.load.cache_clear()
    return kernels.state()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.state() == "compiled"
    assert [path.suffix for path in folder.iterdir()] == [".so"], "and nothing is left over"
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert again() == "compiled"


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign", "a byte"])
def test_a_damaged_library_is_built_again(folder: Path, damage: str) -> None:
    """A truncated one would be mapped, and end the process by a signal when it is used."""
    assert kernels.state() == "compiled"
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.unlink()  # the process has the old one mapped
    middle = len(whole) // 2
    contents = {
        "empty": b"",
        "truncated": whole[:middle],
        "foreign": Path(sys.executable).read_bytes(),
        "a byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }
    path.write_bytes(contents[damage])
    assert again() == "compiled"
    assert len(path.read_bytes()) == len(whole)
    MoeMlp(8, 8, 2)(torch.randn(5, 8)).sum().backward()


def test_a_change_of_the_source_is_another_library(folder: Path, tmp_path: Path, monkeypatch) -> None:
    kernels.state()
    changed = tmp_path / "cpu.c"
    changed.write_text(library.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(library, "SOURCE", changed)
    assert again() == "compiled"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiler_of_another_language_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would give the functions other names."""
    monkeypatch.setenv("CC", "g++")
    assert kernels.state() == "compiled"


def test_a_library_without_the_functions_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.c"
    empty.touch()
    monkeypatch.setattr(library, "SOURCE", empty)
    assert "undefined symbol" in kernels.state()


def test_can_be_switched_off_and_a_wrong_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "plain")
    assert kernels.state() == "plain, by SPARSE_MLP_KERNELS=plain"
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="SPARSE_MLP_KERNELS must be one of auto, plain; got 'fast'"):
        MoeMlp(8, 8, 2)(torch.randn(5, 8))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in kernels.state()
    MoeMlp(8, 8, 2)(torch.randn(5, 8)).sum().backward()


def test_a_compiler_that_fails_is_named_once(tmp_path: Path, folder: Path, monkeypatch, caplog) -> None:
    broken = script(tmp_path / "mycc", "echo 'no space left' >&2\nexit 3")
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert kernels.state() == f"{broken} failed: no space left"
    assert "no space left" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_compiler_that_fails_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "mycc", "echo >&2\nexit 3")))
    assert "exit status 3" in kernels.state()


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    assert kernels.state() == "compiled"
    assert len(list(tmp_path.glob("sparse_mlp-*/kernels-*.so"))) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors of the x86 family")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_kernels_for_lesser_processors(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of four and of eight numbers, not sixteen."""
    flags = tuple(f"-march={processor}" if flag == "-march=native" else flag for flag in library.FLAGS)
    monkeypatch.setattr(library, "FLAGS", flags)
    assert kernels.state() == "compiled"
    for items in (3, 20, 100, 3000):
        torch.manual_seed(0)
        layer, x = MoeMlp(49, 70, 4, 2, noise_std=0.0), torch.randn(items, 49)
        found = []
        for dtype in (torch.float32, torch.float64):
            leaf = x.to(dtype, copy=True).requires_grad_()
            layer.to(dtype).zero_grad()
            y = layer(leaf)
            y.sum().backward()
            found.append([y.detach().double(), leaf.grad.double(), *(p.grad.double() for p in layer.parameters())])
        for ours, exact in zip(*found, strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-5 * max(5.0, float(exact.abs().max())), rtol=1e-4)
