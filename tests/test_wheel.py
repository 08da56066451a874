"""What an installation gets: the package with its data files and licences, and nothing else of the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.mark.slow  # builds a wheel: about 5 s
def test_the_wheel_holds_the_package_alone(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"sparse_mlp", "sparse_mlp_command.py", "sparse_mlp-0.1.0.dist-info"}
    assert not [name for name in wheel.namelist() if "test" in Path(name).name]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile):
    source = ROOT / "src"
    files = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(source).as_posix() for path in files if path.suffix != ".so"}
    assert expected <= set(wheel.namelist())
    assert {"py.typed", "cpu.c"} <= {Path(name).name for name in expected}


@pytest.mark.slow
def test_the_wheel_holds_the_licence(wheel: zipfile.ZipFile):
    folder = "sparse_mlp-0.1.0.dist-info"
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert wheel.read(f"{folder}/licenses/NOTICE") == (ROOT / "NOTICE").read_bytes()
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "https://arxiv.org/abs/2109.02008" in metadata
