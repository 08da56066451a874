"""Any mesh of gloo processes trains as one process does with the same global batch."""

from __future__ import annotations

import pytest

# Everything that could differ: noise, drop path, accumulation, clipping, an average, the last block with four experts.
SPARSE = {
    "model": "sparse_mlp_t4_32",
    "args": {"sparse_blocks": 1, "num_experts": (4, 4), "top_k": (2, 1), "balance_weight": 0.1},
    "optim": {"lr": 3e-3},
    "batch_size": 200,
    "train": {"steps": 20, "log_every": 1, "ema_decay": 0.5, "clip_grad": 0.5, "grad_accum": 2},
}
MESHES = {
    "DDP": {},
    "FSDP": {"shard": True},
    "experts": {"expert": 2},
    "experts and FSDP": {"expert": 2, "shard": True},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_are_one(mesh, train_digits, metric_lines):
    one, code = train_digits("one", **SPARSE)
    assert code == 0
    errors: list[str] = []
    two, code = train_digits("two", ranks=2, errors=errors, mesh=MESHES[mesh], **SPARSE)
    assert code == 0, errors[0][-3000:]
    for a, b in zip(metric_lines(one, "train"), metric_lines(two, "train"), strict=True):
        for name in ("loss", "grad_norm", "balance"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a, b)
    for a, b in zip(metric_lines(one, "eval"), metric_lines(two, "eval"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
