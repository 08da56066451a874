from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets; tests that need it are skipped where it is not told."""
    root = os.environ.get("SPARSE_MLP_DATA")
    if not root:
        pytest.skip("SPARSE_MLP_DATA is not set: no real images to test on")
    return Path(root)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes `count` small images a class, by name, under a folder of the test's own."""

    def make(*parts: str, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, size: int = 20) -> Path:
        root = tmp_path.joinpath(*parts)
        rng = np.random.default_rng(0)
        for name in classes:
            (root / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                    root / name / f"{i:02d}.png"
                )
        return root

    return make
