"""timm's own `tests/test_models.py`, of the installed version, on every name of this package.

The file is in timm's source distribution only, which pip fetches; without an index the tests are skipped. What does not
run here, and why:

- TorchScript (`-k "not torchscript"`): torch has deprecated it, and `torch.export` and ONNX are tested in its place;
- the tests that download weights (`list_models(pretrained=True)`, see `timm_plugin`): test_pretrained.py has them
  without a network;
- `test_prune_intermediate_layers_contract` of the two large Sparse-MLPs: a copy of the model for each of 12 and 14
  blocks, 100 s of the suite's 300 s; `sparse_mlp_s16_224` and the two small ones run the same code;
- the larger sparse pyramids, which are the same class with more of the same blocks: the smallest of each family runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
from timm.models import model_entrypoint

from sparse_mlp.models import registered_names

pytestmark = pytest.mark.slow  # three minutes for all names

SKIPPED = [f"test_prune_intermediate_layers_contract[{name}]" for name in ("sparse_mlp_b16_224", "sparse_mlp_l16_224")]


_SMALLEST = ("sparse_as_mlp_tiny", "sparse_cycle_mlp_b1", "sparse_hire_mlp_tiny")


def _runs(name: str) -> bool:
    """Whether timm's tests run on a name: not on the larger sparse pyramids."""
    return name.startswith("sparse_mlp") or not name.startswith("sparse_") or name in _SMALLEST


def _system(name: str) -> str:
    return model_entrypoint(name).__module__.rsplit(".", 1)[-1]


@pytest.fixture(scope="session")
def timm_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds `tests/` and `pyproject.toml` of timm's source distribution."""
    folder = tmp_path_factory.mktemp("timm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
    fetched = subprocess.run(
        [*command, f"timm=={timm.__version__}", "--dest", str(folder)], capture_output=True, text=True, timeout=120
    )
    if fetched.returncode:
        last = (fetched.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"pip cannot fetch the source distribution of timm {timm.__version__}: {last}")
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        root = archive.getnames()[0].split("/")[0]
        wanted = (f"{root}/tests/", f"{root}/pyproject.toml")
        archive.extractall(folder, [m for m in archive if m.name.startswith(wanted)], filter="data")
    return folder / root


@pytest.mark.parametrize("system", sorted({_system(name) for name in registered_names()}))
def test_timms_model_tests_pass(system: str, timm_tests: Path) -> None:
    names = [name for name in registered_names() if _system(name) == system and _runs(name)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-k", "not torchscript", "--tb=short", *(f"--deselect=tests/test_models.py::{one}" for one in SKIPPED)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [*command, "tests/test_models.py"],
        cwd=timm_tests,
        env={**os.environ, "PYTHONPATH": path, "TIMM_TEST_NAMES": " ".join(names)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    # a selection that misses our names would pass as well: forward, backward, cfg, features (2), FX (2) are seven each
    passed = int(result.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 7 * len(names), result.stdout[-2000:]
