from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


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
