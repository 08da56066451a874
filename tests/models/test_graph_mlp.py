from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_mlp.data.graph_files import load_graph
from sparse_mlp.data.graphs import feature_rows
from sparse_mlp.data.node_batches import hop_weights, normalized_adjacency
from sparse_mlp.models.graph_mlp import GraphMlp, checkpoint_filter_fn, n_contrast

# Outputs of the published files, run unchanged; the rules for weights and inputs are in the file itself.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "graph_mlp.json").read_text())


def weights(layout):
    """The reference weights: noise seeded by the key, scaled by its role."""
    state = {}
    for key, shape in layout:
        noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if key.endswith("bias"):
            noise = 0.1 * noise
        else:
            noise = 1 + 0.1 * noise if len(shape) == 1 else noise / np.sqrt(shape[1])
        state[key] = torch.from_numpy(noise.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def small():
    c = GOLDEN["small"]["inputs"]
    rng = np.random.default_rng(c["seed"])
    nodes, features = c["nodes"], c["features"]
    raw = (rng.integers(0, 4, (nodes, features)) * (rng.random((nodes, features)) < 0.25)).astype(np.float32)
    raw[3] = 0
    up = np.triu(rng.random((nodes, nodes)) < c["edge_probability"], 1)
    up[:, -1] = False
    labels = rng.integers(0, c["classes"], nodes)
    batch = rng.integers(0, nodes, c["batch_size"])
    batch[: c["train_nodes"]] = np.arange(c["train_nodes"])
    a = (up | up.T) + np.eye(nodes)
    scale = a.sum(1) ** -0.5
    x = torch.from_numpy(raw / np.maximum(raw.sum(1, keepdims=True), 1))
    return x, scale[:, None] * a * scale, labels, batch, c["train_nodes"]


@pytest.fixture
def model():
    layout = GOLDEN["small"]["state_dict"]
    model = GraphMlp(32, 4, hidden_dim=16, drop_rate=0.0)
    model.load_state_dict(checkpoint_filter_fn(weights(layout)))
    return model


def nonzeros(power):
    power = torch.as_tensor(power, dtype=torch.float32)
    rows, cols = power.nonzero(as_tuple=True)
    return rows, cols, power[rows, cols]


def naive(z, power, tau, form):
    """The loss with dense matrices, term by term."""
    z = F.normalize(z, dim=1)
    s = z @ z.T
    eye = torch.eye(len(z), dtype=torch.bool)
    power = torch.as_tensor(power, dtype=z.dtype)
    if form == "published":
        e = torch.exp(tau * s.masked_fill(eye, 0))
        return -torch.log((e * power).sum(1) / e.sum(1) + 1e-8).mean()
    e = torch.exp(s / tau).masked_fill(eye, 0)
    positive = (e * power).sum(1)
    has = positive > 0
    return -torch.log(positive[has] / e.sum(1)[has] + 1e-8).mean()


def test_logits_equal_the_published_code(small, model):
    wanted = torch.tensor(GOLDEN["small"]["eval"]["logits"])
    assert sum(p.numel() for p in model.parameters()) == GOLDEN["small"]["params"]
    torch.testing.assert_close(model.eval()(small[0]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", GOLDEN["small"]["losses"], ids=lambda case: f"tau{case['tau']}-hops{case['order']}")
def test_losses_and_gradients_equal_the_published_code(small, model, case):
    x, normalized, labels, batch, train = small
    power = np.linalg.matrix_power(normalized, case["order"])
    contrast = n_contrast(model.forward_features(x), *nonzeros(power), case["tau"])
    assert contrast.item() == pytest.approx(case["ncontrast_all_nodes"], abs=1e-5)

    z = model.forward_features(x[batch])
    contrast = n_contrast(z, *nonzeros(power[batch][:, batch]), case["tau"])
    nll = F.cross_entropy(model.forward_head(z)[:train], torch.from_numpy(labels[:train]))
    assert contrast.item() == pytest.approx(case["batch"]["ncontrast"], abs=1e-5)
    assert nll.item() == pytest.approx(case["batch"]["nll"], abs=1e-5)
    (nll + case["alpha"] * contrast).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, norm, _ in case["batch"]["grads"]:
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-5), name


def test_misreadings_of_the_formula_give_other_losses(small, model):
    case = GOLDEN["small"]["losses"][0]
    x, normalized, *_ = small
    pairs = nonzeros(np.linalg.matrix_power(normalized, 2))
    z = model.forward_features(x)
    wrong = case["not_the_published_value"]
    assert n_contrast(z, *pairs, 1 / 2.0).item() == pytest.approx(wrong["similarity_divided_by_tau"], abs=1e-5)
    # the paper's formula skips the nodes without a neighbour, whose term would be -log(1e-8)
    alone = int(((normalized > 0).sum(1) == 1).sum())
    without = n_contrast(z, *pairs, 1 / 2.0, form="paper").item()
    assert ((24 - alone) * without - alone * np.log(1e-8)) / 24 == pytest.approx(
        wrong["diagonal_left_out_of_both_sums"], abs=1e-4
    )


@pytest.mark.parametrize("form", ["published", "paper"])
@pytest.mark.parametrize("elements", [2**23, 50])
def test_blocks_give_the_loss_and_gradient_of_the_dense_formula(small, form, elements, monkeypatch):
    monkeypatch.setattr("sparse_mlp.models.graph_mlp.BLOCK_ELEMENTS", elements)  # 50: blocks of two rows
    power = np.linalg.matrix_power(small[1], 3)[small[3]][:, small[3]]
    torch.manual_seed(0)
    values = torch.randn(20, 6)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss = n_contrast(ours, *nonzeros(power), 0.7, form=form)
    wanted = naive(theirs, power, 0.7, form)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_extreme_temperatures_stay_finite(small):
    power = nonzeros(np.linalg.matrix_power(small[1], 2))
    for tau in (1e-3, 40.0):
        z = torch.randn(24, 8, requires_grad=True)
        loss = n_contrast(z, *power, tau)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def test_slices_of_a_batch_have_the_whole_loss_and_its_gradient(small):
    """What two ranks compute, one after the other: each gets the rows of its half and everybody's embeddings."""
    power = np.linalg.matrix_power(small[1], 2)
    z = torch.randn(24, 8, requires_grad=True)
    rows, cols, values = nonzeros(power)
    whole = n_contrast(z, rows, cols, values, 2.0)
    whole.backward()
    seen: dict[int, list] = {0: [], 1: []}
    for _ in range(4):  # unit vectors, numerators, denominators: each pass can supply one more of the others' values
        for rank in (0, 1):
            own = slice(12 * rank, 12 * rank + 12)
            half = z.detach()[own].requires_grad_()
            mine = (rows >= own.start) & (rows < own.stop)
            calls: list = []

            def gather(local, rank=rank, calls=calls):
                other = seen[1 - rank][len(calls)] if len(seen[1 - rank]) > len(calls) else torch.ones_like(local)
                calls.append(local.clone())
                return torch.cat([local, other] if rank == 0 else [other, local])

            loss = n_contrast(half, rows[mine], cols[mine], values[mine], 2.0, gather=gather, offset=own.start)
            loss.backward()
            seen[rank] = calls
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(half.grad, z.grad[12:])


def test_bfloat16_similarities_are_close(small):
    z = torch.randn(24, 32)
    pairs = nonzeros(small[1])
    exact = n_contrast(z, *pairs, 1.0)
    assert n_contrast(z, *pairs, 1.0, dtype=torch.bfloat16).item() == pytest.approx(exact.item(), abs=5e-3)


def test_sparse_features_give_what_dense_ones_give(small, model):
    x = small[0]
    import scipy.sparse as sp

    rows = feature_rows(sp.csr_matrix(x.numpy()))
    assert rows.layout == torch.sparse_csr
    torch.testing.assert_close(model(rows), model(x), atol=1e-6, rtol=1e-5)
    model(x).sum().backward()
    wanted = model.mlp.fc1.weight.grad.clone()
    model.zero_grad()
    model(rows).sum().backward()
    torch.testing.assert_close(model.mlp.fc1.weight.grad, wanted, atol=1e-6, rtol=1e-4)


def test_feature_dropout_drops_in_training_only(small, model):
    import scipy.sparse as sp

    model.input_drop_rate = 0.5
    for x in (small[0], feature_rows(sp.csr_matrix(small[0].numpy()))):
        torch.manual_seed(0)
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_sparse_graph_mlp_trains_every_used_expert():
    torch.manual_seed(0)
    model = GraphMlp(32, 4, hidden_dim=16, num_experts=4, top_k=2, expert_dim=8)
    x = torch.randn(64, 32)
    model(x).sum().backward()
    assert model(x).shape == (64, 4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_errors_name_the_value(model):
    with pytest.raises(ValueError, match=r"\(N, 32\) expected, got \(3, 31\)"):
        model(torch.zeros(3, 31))
    pairs = nonzeros(np.eye(3))
    with pytest.raises(ValueError, match="'published' or 'paper', got 'other'"):
        n_contrast(torch.randn(3, 2), *pairs, 1.0, form="other")
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        n_contrast(torch.randn(3, 2), *pairs, 0)
    with pytest.raises(ValueError, match=r"tau 0\.01 scales cosines by 100"):
        n_contrast(torch.randn(3, 2), *pairs, 0.01, form="paper")


def test_the_model_needs_no_torch_geometric():
    code = "import sys; sys.modules['torch_geometric'] = None; from sparse_mlp.models.graph_mlp import GraphMlp"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.skipif("SPARSE_MLP_DATA" not in os.environ, reason="SPARSE_MLP_DATA is not set: no Cora to test on")
def test_cora_equals_the_published_code_and_sparse_equals_dense():
    cora = GOLDEN["cora"]
    graph = load_graph("cora")
    model = GraphMlp(1433, 7).eval()
    model.load_state_dict(weights(cora["state_dict"]))
    with torch.no_grad():
        z = model.forward_features(feature_rows(graph.features))
        logs = model.forward_head(z).log_softmax(1)
    torch.testing.assert_close(logs[:4], torch.tensor(cora["log_probs_first4"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(logs[-2:], torch.tensor(cora["log_probs_last2"]), atol=1e-5, rtol=0)
    normalized = normalized_adjacency(graph.adjacency)
    everyone = np.arange(graph.num_nodes)
    for case in cora["losses"]:
        pairs = [torch.from_numpy(part) for part in hop_weights(normalized, everyone, case["order"])]
        assert len(pairs[2]) == case["adj_power_nonzeros"]
        contrast = n_contrast(z, *pairs, case["tau"])
        assert contrast.item() == pytest.approx(case["ncontrast_all_nodes"], abs=1e-5)
        dense = np.linalg.matrix_power(normalized.toarray().astype(np.float64), case["order"])
        exact = naive(z.double(), dense, case["tau"], "published").item()
        ours = n_contrast(z.double(), pairs[0], pairs[1], pairs[2].double(), case["tau"]).item()
        assert ours == pytest.approx(exact, abs=1e-6)
        assert contrast.item() == pytest.approx(exact, rel=1e-6)
