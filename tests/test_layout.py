"""Rules of the house that no linter knows."""

import ast
from pathlib import Path

import pytest

import sparse_mlp

PACKAGE = Path(sparse_mlp.__file__).parent


@pytest.mark.parametrize("folder", ["models", "mixing", "moe"])
def test_models_know_nothing_of_torch_distributed(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.distributed") for name in names), f"{path} imports {names}"


def test_library_code_does_not_print() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path


def test_files_stay_readable() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 700, path
