"""Reference outputs of published models, and the published forms themselves."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


def fill_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """The reference value of the tensor called `key` in a published state dict: by key and published shape alone."""
    noise = np.random.default_rng(zlib.crc32(key.encode("utf-8"))).standard_normal(shape).astype(np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        value = np.abs(1.0 + 0.1 * noise)
    elif leaf == "running_mean" or leaf.endswith("bias"):
        value = 0.1 * noise
    elif len(shape) <= 1:
        value = 1.0 + 0.1 * noise
    else:
        value = noise / np.sqrt(int(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def image_batch(batch: int = 2, height: int = 224, width: int = 224) -> Tensor:
    """The reference images: unit normal, (batch, 3, height, width)."""
    rng = np.random.default_rng(20210905)
    return torch.from_numpy(rng.standard_normal((batch, 3, height, width)).astype(np.float32))


def fill(model: nn.Module) -> dict[str, Tensor]:
    """Fill a model in a published layout by the rule; constants (offsets, counters) stay. Returns its state dict."""
    state_dict = {
        key: value.clone() if key.endswith((".offset", "num_batches_tracked")) else fill_tensor(key, tuple(value.shape))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state_dict)
    return state_dict


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reference:
    """What tests of published models need: the published forms, the filling rule, the reference files."""

    published = load_module(HERE.parents[1] / "benchmarks" / "published.py")
    fill = staticmethod(fill)
    images = staticmethod(image_batch)

    @staticmethod
    def golden(name: str) -> dict:
        return json.loads((HERE / "golden" / f"{name}.json").read_text())

    @functools.lru_cache(maxsize=4)  # noqa: B019 (one object per session)
    def _filled(self, name: str, dense: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        model = self.published.build(name, dense=dense).eval()
        return model, fill(model)

    def weights(self, name: str, dense: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
        """The published form of a variant, filled, in eval mode, and its state dict; the caller's own copies."""
        return copy.deepcopy(self._filled(name, dense))


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="session")
def assert_golden(reference):
    """Check a model filled with the reference weights against its reference file."""

    def check(model: nn.Module, name: str, features: dict[str, int]) -> None:
        """`features`: the file's name of a feature -> the stage whose output it is."""
        golden = reference.golden(name)
        with torch.inference_mode():
            last, stages = model.eval().forward_intermediates(reference.images())
            logits = model.forward_head(last)
        expected = torch.tensor(golden["logits"])
        largest = logits.abs().max()
        assert (logits[:, : expected.shape[1]] - expected).abs().max() <= 1e-5 * largest
        assert logits.norm().item() == pytest.approx(golden["logits_norm"], rel=1e-5)
        assert logits.sum().item() == pytest.approx(
            golden["logits_sum"], abs=1e-5 * largest.item() * logits.numel() ** 0.5
        )
        assert logits.argmax(1).tolist() == golden["logits_argmax"]
        entries = {entry["name"]: entry for entry in golden["features"]}
        for key, stage in features.items():
            _check_map(stages[stage], entries[key])

    def _check_map(value: Tensor, entry: dict) -> None:
        assert list(value.shape) == entry["shape"]
        assert value.double().norm().item() == pytest.approx(entry["norm"], rel=2e-5)
        bound = 3e-5 * value.abs().max()
        channels, height, width = len(entry["top_left"]), *value.shape[2:]
        places = {"top_left": (0, 0, 0), "bottom_right": (-1, -1, -1), "centre": (0, height // 2, width // 2)}
        for where, (image, row, column) in places.items():
            assert (value[image, :channels, row, column] - torch.tensor(entry[where])).abs().max() <= bound, where

    return check
