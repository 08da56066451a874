"""Every kind of run trains on a mesh by the same flags under torchrun."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tests.torchrun import finished, torchrun

pytestmark = pytest.mark.slow  # each starts processes that import torch

SPARSE = ["--model.args", "num_blocks=2", "sparse_blocks=1", "embed_dim=32"]
DIGITS = ["--data.name", "digits", "--data.batch-size", "64", "--data.image-size", "8", *SPARSE]
RUNS = {
    "pretrain": [
        "digits_moco_sparse",
        "--train.steps",
        "6",
        "--train.epochs",
        "None",
        "--data.batch-size",
        "64",
        *SPARSE,
    ],
    "probe": [
        "linear_probe",
        "--train.steps",
        "4",
        "--train.epochs",
        "None",
        *DIGITS,
        "--model.name",
        "sparse_mlp_t4_32",
    ],
    "nodes": ["cora", "--train.steps", "6", "--task.distill", "0"],
    "segment": [
        "camvid",
        "--train.steps",
        "2",
        "--train.epochs",
        "None",
        "--data.batch-size",
        "2",
        "--data.image-size",
        "96",
    ],
    "detect": ["coco_small_retinanet", "--train.steps", "2", "--train.epochs", "None"],
}
MESHES = {
    "pretrain": ["--mesh.expert", "2", "--mesh.shard"],
    "probe": ["--mesh.expert", "2", "--mesh.shard"],
    "nodes": ["--mesh.shard"],
    "segment": ["--mesh.expert", "2", "--mesh.shard", "--model.experts.blocks", "2"],
    "detect": ["--mesh.shard"],
}


def train(out: Path, ranks: int, *words: str) -> list[float]:
    """The losses of a run's steps."""
    logging = ["--train.log-every", "1", "--train.eval-every", "0"]
    finished(torchrun("-m", "sparse_mlp", "train", *words, *logging, "--out", out, ranks=ranks), 500)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (out / "report.html").is_file()
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("kind", RUNS)
def test_a_kind_on_a_mesh(kind, tmp_path):
    if kind in ("nodes", "segment", "detect") and not os.environ.get("SPARSE_MLP_DATA"):
        pytest.skip("SPARSE_MLP_DATA is not set")
    words = list(RUNS[kind])
    if kind == "probe":
        torch.manual_seed(0)
        model = timm.create_model(
            "sparse_mlp_t4_32", img_size=8, in_chans=1, num_blocks=2, sparse_blocks=1, embed_dim=32
        )
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        words += ["--model.weights", str(tmp_path / "weights.safetensors")]
    found = train(tmp_path / "two", 2, *words, *MESHES[kind])
    if kind == "detect":  # which proposals are sampled is drawn by rank
        assert len(found) == 2
        return
    whole = MESHES[kind][3:] if kind == "segment" else []
    expected = train(tmp_path / "one", 1, *words, *whole)
    assert found[:1] == pytest.approx(expected[:1], rel=1e-5)
    # sums of batch norms over ranks round otherwise, which the first steps of AdamW make large
    assert found == pytest.approx(expected, rel=1e-5 if kind in ("nodes", "probe") else 1e-2)
