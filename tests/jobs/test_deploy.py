"""A run's model as a program: the same answers for any batch, in a process without this package, and in 8 bits."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import sparse_mlp
from sparse_mlp.data import InputSpec
from sparse_mlp.jobs import Run, deploy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A few steps of a small Sparse-MLP on the digits."""
    recipe = sparse_mlp.recipe("digits_sparse", train={"epochs": None, "steps": 10}, schedule={"warmup_epochs": None})
    return sparse_mlp.train(recipe, tmp_path_factory.mktemp("deploy") / "run", show=False)


@pytest.mark.slow  # a training, and the exporter
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_a_program_of_torch_runs_without_this_package(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    text = run.export(target, to="torch-export")
    assert "torch.export.load" in text
    images = torch.randn(5, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    program = (
        f"import sys, torch; sys.modules['sparse_mlp'] = None; m = torch.export.load({str(target)!r}).module(); "
        f"torch.save(m(torch.load({str(tmp_path / 'images.pt')!r})), {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), run.load()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # a training, and the exporter
@pytest.mark.filterwarnings("ignore")
def test_onnx_in_float_and_in_8_bits(run: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    whole, small = tmp_path / "model.onnx", tmp_path / "small.onnx"
    assert "onnxruntime.InferenceSession" in run.export(whole, to="onnx")
    text = run.export(small, to="onnx", int8=True)
    before, after = (float(share) for share in re.findall(r"([\d.]+)% in", text))
    assert before == pytest.approx(100 * run.metrics["top1"], abs=0.01) and abs(before - after) < 3
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    weights = tmp_path / "weights.onnx"
    text = run.export(weights, to="onnx", int8=True, weight_only=True)
    before, after = (float(share) for share in re.findall(r"([\d.]+)% in", text))
    assert before == pytest.approx(100 * run.metrics["top1"], abs=0.01) and abs(before - after) < 1
    assert weights.stat().st_size < 0.5 * whole.stat().st_size
    session = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["image_size"] == "8"
    for batch in (1, 2, 9):
        images = torch.randn(batch, 1, 8, 8)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, run.load()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # the exporter
@pytest.mark.filterwarnings("ignore")
def test_only_the_weights_of_a_dense_model_are_rounded(tmp_path: Path) -> None:
    """The answers are those of a model whose weights were rounded in blocks, without any rounding of activations."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = timm.create_model("mixer_t4_32", num_classes=3, num_blocks=1, embed_dim=16).eval()
    torch.nn.init.normal_(model.head.weight)
    spec = InputSpec(("a", "b", "c"), 3, 32, (0.5,) * 3, (0.5,) * 3, 1.0)
    deploy.export(model, "mixer_t4_32", spec, "onnx", tmp_path / "model.onnx")
    deploy.quantize_weights(tmp_path / "model.onnx", tmp_path / "small.onnx")
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = _rounded(module.weight.data)
    images = torch.randn(2, 3, 32, 32)
    found = deploy.load(tmp_path / "small.onnx", "onnx")(images)
    with torch.no_grad():
        torch.testing.assert_close(found, rounded(images), atol=1e-4, rtol=1e-4)
        assert (found - model(images)).abs().max() > 1e-4


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """(out, in): each 32 of a row in steps of a 128th of the one with the largest size, which is -128 of them."""
    rows = []
    for row in weight:
        for block in row.split(32):
            step = block[block.abs().argmax()] / -128
            rows.append((block / step).round().clamp(-128, 127) * step)
    return torch.cat(rows).view_as(weight)


@pytest.mark.slow  # the exporter
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cycle_mlp_b1", "hire_mlp_tiny", "as_mlp_tiny", "sparse_cycle_mlp_b1"])
def test_onnx_of_a_pyramid_takes_two_sizes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, depths=[1, 1, 1, 1]).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    spec = InputSpec(("a", "b", "c"), 3, 64, (0.5,) * 3, (0.5,) * 3, 1.0)
    program = deploy.export(model, name, spec, "onnx", tmp_path / "model.onnx")
    assert program.sizes == "any batch, any size that the model takes"
    for height, width in ((96, 64), (64, 160)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(program.call(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # the exporter
@pytest.mark.filterwarnings("ignore")
def test_a_pyramid_keeps_its_size_dynamic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("cycle_mlp_b1", num_classes=3).eval()
    spec = InputSpec(("a", "b", "c"), 3, 64, (0.5,) * 3, (0.5,) * 3, 1.0)
    program = deploy.export(model, "cycle_mlp_b1", spec, "torch-export", tmp_path / "model.pt2")
    assert "any size" in program.sizes
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.call(images), model(images), atol=1e-4, rtol=1e-4)
