from __future__ import annotations

import gzip
import importlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from experiments.graphs.random_graphs import planted_graph
from sparse_mlp.data.edges import add_knn_edges, prune_edges
from sparse_mlp.data.graph_files import Split, from_data, load_graph
from sparse_mlp.data.graphs import from_arrays, random_split, rows_sum_to_one
from sparse_mlp.data.node_batches import NodeBatches, eval_batches, hop_weights, normalized_adjacency
from sparse_mlp.data.planetoid import load_pickle


@pytest.fixture(scope="module")
def graph():
    return planted_graph(400, 1200, classes=3, features=8)


def arrays(**changes):
    """A sound graph of four nodes on a ring, two classes; `changes` spoil it."""
    made = {
        "name": "ring",
        "features": np.eye(4, dtype=np.float32),
        "edges": np.array([[0, 1, 2, 3], [1, 2, 3, 0]]),
        "labels": np.array([0, 1, 0, 1]),
        "splits": {"train": np.array([0, 1]), "val": np.array([2]), "test": np.array([3])},
    }
    return made | changes


@pytest.mark.parametrize("hops", [1, 2, 3, 4, 5])
def test_hop_weights_are_the_dense_power_at_the_batch(graph, hops):
    normalized = normalized_adjacency(graph.adjacency)
    dense = graph.adjacency.toarray() + np.eye(400)
    scale = dense.sum(1) ** -0.5
    power = np.linalg.matrix_power(scale[:, None] * dense * scale, hops)
    batch = np.random.default_rng(0).integers(0, 400, 50)  # some nodes twice
    batch[1] = batch[0]
    wanted = power[batch][:, batch]
    rows, cols, weights = hop_weights(normalized, batch, hops)
    found = np.zeros((50, 50))
    found[rows, cols] = weights
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert len(np.unique(rows * 50 + cols)) == len(rows) and (np.diff(rows) >= 0).all()
    part = hop_weights(normalized, batch, hops, slice(20, 30))
    inside = (rows >= 20) & (rows < 30)
    for one, other in zip(part, (rows, cols, weights), strict=True):
        np.testing.assert_allclose(one, other[inside], atol=1e-7)


def test_hop_count_zero_is_an_error(graph):
    with pytest.raises(ValueError, match="hops must be at least 1, got 0"):
        hop_weights(normalized_adjacency(graph.adjacency), np.arange(3), 0)


@pytest.mark.parametrize("sampling", ["published", "distinct"])
def test_batches_depend_on_seed_and_step_only(graph, sampling):
    one, two, other = (NodeBatches(graph, 150, 2, seed, sampling=sampling) for seed in (0, 0, 1))
    for step in (7, 3):
        assert all(torch.equal(a, b) for a, b in zip(one[step].values(), two[step].values(), strict=True))
    assert not torch.equal(one[3]["index"], one[4]["index"])
    assert not torch.equal(one[3]["index"], other[3]["index"])
    batch = one[3]
    train = torch.from_numpy(graph.splits["train"])
    assert torch.equal(batch["index"][: len(train)], train)
    assert torch.equal(batch["target"][: len(train)], torch.from_numpy(graph.labels)[train])
    assert (batch["target"][len(train) :] == -1).all() and len(batch["index"]) == 150
    assert (len(batch["index"].unique()) == 150) == (sampling == "distinct")


def test_ranks_hold_the_slices_of_one_batch(graph):
    whole = NodeBatches(graph, 160, 2, 0)[5]
    parts = [NodeBatches(graph, 160, 2, 0, rank=rank, world_size=2)[5] for rank in (0, 1)]
    for name in ("index", "target", "rows", "cols", "weights", "features"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name])
    with pytest.raises(ValueError, match="161 nodes does not divide among 2 ranks"):
        NodeBatches(graph, 161, 2, 0, world_size=2)


def test_evaluation_sees_every_node_once_over_the_ranks(graph):
    seen = [batch for rank in (0, 1) for batch in eval_batches(graph, 100, rank=rank, world_size=2)]
    index, val = (torch.cat([batch[key] for batch in seen]).numpy() for key in ("index", "val"))
    np.testing.assert_array_equal(np.sort(index[val]), graph.splits["val"])
    np.testing.assert_array_equal(np.sort(index[~val]), graph.splits["test"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((0, 3))}, "the graph is empty"),
        ({"features": np.eye(5, dtype=np.float32)}, "4 labels for the features of 5 nodes"),
        ({"edges": np.array([[0], [4]])}, "node id 4 in the edges, but features are for nodes 0 to 3"),
        ({"edges": np.array([[-1], [2]])}, "node id -1 in the edges"),
        ({"edges": np.zeros((3, 3), np.int64)}, r"edges of shape \(2, E\) expected, got \(3, 3\)"),
        ({"features": np.full((4, 2), np.nan)}, "8 features are NaN or infinite"),
        ({"splits": {"train": np.array([0, 2])}}, "no training node of class 1"),
        ({"splits": {"train": np.array([0, 1, 9])}}, "node id out of range in split 'train'"),
        (
            {"splits": {"train": np.array([0, 1]), "test": np.array([1, 2])}},
            "1 nodes are in the splits 'train' and 'test'",
        ),
        ({"labels": np.full(4, -1)}, "no node has a label"),
        ({"features": -np.eye(4, dtype=np.float32), "row_normalize": True}, "negative features have no row sum"),
    ],
)
def test_what_is_wrong_with_a_graph_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**arrays(**changes))


def test_directed_graphs_are_made_symmetric_and_it_is_said():
    graph = from_arrays(**arrays(edges=np.array([[0, 1, 1, 2, 2, 2], [1, 0, 2, 2, 0, 0]])))  # a loop, a repeat
    np.testing.assert_array_equal(graph.adjacency.toarray()[:3, :3], 1 - np.eye(3))
    assert graph.num_edges == 3
    assert graph.notes == ("directed graph made symmetric: 2 edges had one direction only",)


def test_rows_sum_to_one_and_rows_of_zeros_stay():
    x = np.array([[1, 3], [0, 0]], np.float32)
    for made in (rows_sum_to_one(x, "x"), rows_sum_to_one(sp.csr_matrix(x), "x")):
        made = made.toarray() if sp.issparse(made) else made
        np.testing.assert_allclose(made, [[0.25, 0.75], [0, 0]])


def test_random_splits_are_disjoint_and_need_enough_nodes(graph):
    one, two = random_split(graph, 0), random_split(graph, 1)
    ids = np.concatenate(list(one.splits.values()))
    assert len(np.unique(ids)) == len(ids) == 400
    assert [len(one.splits[name]) for name in ("train", "val")] == [60, 90]
    assert not np.array_equal(one.splits["train"], two.splits["train"])
    with pytest.raises(ValueError, match=r"100 training and 100 validation nodes .* are 201"):
        random_split(graph, 0, train=100, val=100)


def test_trusted_edges_are_those_of_similar_ends():
    x = np.array([[1, 0], [1, 0.1], [0, 1], [0, 1]], np.float32)
    trusted = prune_edges(from_arrays(**arrays(features=x)), 0.5)
    assert trusted.adjacency.toarray().nonzero()[0].tolist() == [0, 1, 2, 3]  # 0-1 and 2-3


def test_similar_nodes_are_joined_and_edges_stay():
    x = np.array([[1, 0], [1, 0.1], [0, 1], [0, 0]], np.float32)
    joined = add_knn_edges(from_arrays(**arrays(features=x, edges=np.array([[2], [3]]))), 1)
    # 0 and 1 choose each other, 2 chooses 1 (cosine 0.1), 3 has no features to choose by and keeps its edge
    assert np.argwhere(np.triu(joined.adjacency.toarray())).tolist() == [[0, 1], [1, 2], [2, 3]]
    with pytest.raises(ValueError, match="between 1 and 3, got 4"):
        add_knn_edges(joined, 4)


class Attack:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_calls_a_function_is_refused(tmp_path, capsys):
    for name, value in (("call", Attack()), ("nested", {"a": [Attack()]}), ("class", np.float64)):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(value, protocol=2))
        with pytest.raises(ValueError, match=rf"{name}: refused"):
            load_pickle(path)
    (tmp_path / "cut").write_bytes(pickle.dumps({1: [2]}, protocol=2)[:-4])
    with pytest.raises(ValueError, match="refused"):
        load_pickle(tmp_path / "cut")
    assert "must not run" not in capsys.readouterr().out


def test_a_matrix_whose_parts_disagree_is_refused(tmp_path):
    matrix = sp.csr_matrix(np.eye(3, dtype=np.float32))
    matrix.indices = np.array([0, 1, 7], np.int32)
    # as the original files have it: scipy.sparse.csr, protocol 2
    (tmp_path / "bad").write_bytes(pickle.dumps(matrix, protocol=2))
    with pytest.raises(ValueError, match="refused"):
        load_pickle(tmp_path / "bad")


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows) + "\n")


def test_a_folder_of_ogb(tmp_path):
    made = arrays()
    write_csv(tmp_path / "raw" / "edge.csv.gz", made["edges"].T.tolist())
    write_csv(tmp_path / "raw" / "node-feat.csv.gz", made["features"].tolist())
    write_csv(tmp_path / "raw" / "node-label.csv.gz", made["labels"][:, None].tolist())
    for split, stem in (("train", "train"), ("val", "valid"), ("test", "test")):
        write_csv(tmp_path / "split" / "time" / f"{stem}.csv.gz", made["splits"][split][:, None].tolist())
    graph = load_graph(str(tmp_path))
    assert graph.num_nodes == 4 and graph.num_edges == 4 and graph.splits["test"].tolist() == [3]


def test_a_saved_data_is_read_without_running_code(tmp_path):
    data = pytest.importorskip("torch_geometric.data")
    masks = {f"{name}_mask": torch.zeros(4, dtype=torch.bool) for name in ("train", "val", "test")}
    masks["train_mask"][:2] = masks["val_mask"][2] = masks["test_mask"][3] = True
    made = data.Data(x=torch.eye(4), edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0, 1, 0, 1]), **masks)
    torch.save(made, tmp_path / "data.pt")
    graph = load_graph(str(tmp_path))
    assert graph.num_edges == 1 and graph.splits["train"].tolist() == [0, 1]
    torch.save({"x": Attack()}, tmp_path / "data.pt")
    with pytest.raises(ValueError, match="refused: it names print, which no graph needs"):
        load_graph(str(tmp_path))
    with pytest.raises(ValueError, match="train_mask has 3 entries for the features of 4 nodes"):
        from_data({"x": torch.eye(4), "edge_index": made.edge_index, "y": made.y, "train_mask": torch.ones(3).bool()})


def test_masks_of_several_columns_are_several_splits():
    rows = {"x": torch.eye(4), "edge_index": torch.tensor([[0, 1], [1, 0]]), "y": torch.tensor([0, 1, 0, 1])}
    masks = {"train_mask": torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]).bool()}
    for column, train in ((0, [0, 1]), (1, [2, 3])):
        assert from_data(rows | masks, split=Split(seed=column)).splits["train"].tolist() == train
    with pytest.raises(ValueError, match="split_seed 2 given, but train_mask has columns 0 to 1"):
        from_data(rows | masks, split=Split(seed=2))
    with pytest.raises(ValueError, match=r"edge_index holds node ids, but is of type torch\.float32"):
        from_data(rows | masks | {"edge_index": torch.ones(2, 1)})
    one = {"train_mask": masks["train_mask"][:, 0]}
    with pytest.raises(ValueError, match="train_per_class 5 would be ignored: graph brings its split"):
        from_data(rows | masks, split=Split(train=5))
    with pytest.raises(ValueError, match="split_seed 1 would be ignored: graph brings its split"):
        from_data(rows | one, split=Split(seed=1))


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (np.array([0, 1, 0, -1]), [0, 1, 0, -1]),
        (np.array([0, 1, 0, -100]), [0, 1, 0, -1]),
        (np.array([0, 1, np.nan, 1], np.float32), [0, 1, -1, 1]),
        (np.array([[0], [1], [0], [1]]), [0, 1, 0, 1]),
        (np.array([[1, 0], [0, 1], [0, 0], [0, 1]], np.float32), [0, 1, -1, 1]),  # one-hot, one node without a class
        (np.array([True, False, False, True]), [1, 0, 0, 1]),
    ],
)
def test_labels_of_any_usual_kind_are_class_numbers(labels, numbers):
    graph = from_arrays(**arrays(labels=labels))
    assert graph.labels.tolist() == numbers and graph.labels.dtype == np.int64 and graph.num_classes == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 0.5, 1]), r"the label of node 2 is 0\.5; classes are whole numbers"),
        (np.array([0, 1, np.inf, 1]), "the label of node 2 is inf"),
        (np.array([[1, 1], [0, 1], [0, 1], [0, 1]]), r"labels of shape \(4, 2\) are not one-hot"),
        (np.array([0, 1, 10**9, 1]), "the label 1000000000 is no class number"),
        (np.full(4, np.nan), "no node has a label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**arrays(labels=labels))


def test_nodes_without_a_label_leave_the_training_and_it_is_said():
    splits = {"train": np.array([0, 1, 2]), "test": np.array([3])}
    graph = from_arrays(**arrays(labels=np.array([0, 1, -1, -1]), splits=splits))
    assert graph.splits["train"].tolist() == [0, 1] and graph.splits["test"].tolist() == [3]
    assert graph.labelled("test").tolist() == []
    assert graph.notes[1:] == (
        "1 nodes of the split 'train' have no label and are left out of it",
        "1 test nodes have no label and are not counted in the accuracy",
    )


def pyg_data(**changes):
    data = pytest.importorskip("torch_geometric.data")
    masks = {f"{name}_mask": torch.zeros(4, dtype=torch.bool) for name in ("train", "val", "test")}
    masks["train_mask"][:2] = masks["val_mask"][2] = masks["test_mask"][3] = True
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    values = {"x": torch.eye(4), "edge_index": edges, "y": torch.tensor([0, 1, 0, 1]), **masks} | changes
    return data.Data(**{name: value for name, value in values.items() if value is not None})


def kinds_of_data():
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    matrix = torch.sparse_coo_tensor(edges.flip(0), torch.ones(3), (4, 4))
    return {
        "a Parameter": pyg_data(x=torch.nn.Parameter(torch.eye(4))),
        "sparse features": pyg_data(x=torch.eye(4).to_sparse()),
        "one-hot": pyg_data(y=torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])),
        "adj_t": pyg_data(edge_index=None, adj_t=matrix.coalesce()),
        "adj_t in rows": pyg_data(edge_index=None, adj_t=matrix.to_sparse_csr()),
        "a list of one": [pyg_data()],
        "a dataset of one": (pyg_data().to_dict(), None, type(pyg_data())),
    }


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "kind", ["a Parameter", "sparse features", "one-hot", "adj_t", "adj_t in rows", "a list of one", "a dataset of one"]
)
def test_a_saved_graph_in_another_form_is_the_same_graph(tmp_path, kind):
    torch.save(kinds_of_data()[kind], tmp_path / "data.pt")
    graph = load_graph(str(tmp_path / "data.pt"))
    assert graph.num_edges == 3 and graph.labels.tolist() == [0, 1, 0, 1] and graph.splits["train"].tolist() == [0, 1]
    dense = graph.features.toarray() if sp.issparse(graph.features) else graph.features
    np.testing.assert_array_equal(dense, np.eye(4))


def test_a_graph_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    """The file names the device of each tensor; what torch is asked for is to put all of them on the CPU."""
    pytest.importorskip("torch_geometric")
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options) or load(*args, **options))
    torch.save(pyg_data(), tmp_path / "data.pt")
    load_graph(str(tmp_path))
    assert [options["map_location"] for options in asked] == ["cpu"]


def test_reading_a_saved_graph_prints_nothing(tmp_path):
    """Importing torch_geometric warns of its own use of torch.jit.script, which is no affair of the user's."""
    torch.save(pyg_data(), tmp_path / "data.pt")
    code = f"from sparse_mlp.data.graph_files import load_graph; load_graph({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_several_graphs_and_several_kinds_of_nodes_are_refused_with_a_way_out(tmp_path):
    data = pytest.importorskip("torch_geometric.data")
    one = pyg_data()
    torch.save([one, one, one], tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"data\.pt holds 3 graphs, but the nodes of one are learned"):
        load_graph(str(tmp_path))
    torch.save((one.to_dict(), {"x": torch.tensor([0, 2, 4])}, data.Data), tmp_path / "data.pt")
    with pytest.raises(ValueError, match="holds 2 graphs"):
        load_graph(str(tmp_path))
    mixed = data.HeteroData()
    mixed["paper"].x = torch.eye(4)
    mixed["author"].x = torch.eye(2)
    mixed["author", "writes", "paper"].edge_index = torch.tensor([[0], [1]])
    torch.save(mixed, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"HeteroData with nodes of the types paper, author.*to_homogeneous\(\)"):
        load_graph(str(tmp_path))


def test_the_sizes_of_a_random_split_can_be_chosen(tmp_path, graph):
    coo = graph.adjacency.tocoo()
    data = {"x": torch.from_numpy(graph.features), "y": torch.from_numpy(graph.labels)}
    data["edge_index"] = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    splits = from_data(data, split=Split(train=5, val=0)).splits
    assert [len(splits[part]) for part in ("train", "val", "test")] == [15, 0, 385]


def test_own_normalisations_are_those_of_torch_geometric(graph):
    """To rounding; why its functions are not called is said in data/graphs.py."""
    transforms = pytest.importorskip("torch_geometric.utils")
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    coo = graph.adjacency.tocoo()
    edges = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    (rows, cols), weights = gcn_norm(edges, num_nodes=graph.num_nodes)
    theirs = sp.csr_matrix((weights.numpy(), (rows.numpy(), cols.numpy())), shape=(400, 400))
    np.testing.assert_allclose(normalized_adjacency(graph.adjacency).toarray(), theirs.toarray(), rtol=1e-6)
    one_way = edges[:, edges[0] < edges[1]]
    both = from_data({"x": torch.ones(400, 1), "edge_index": one_way, "y": torch.from_numpy(graph.labels)}).adjacency
    again = transforms.to_undirected(one_way)
    assert np.array_equal(np.argwhere(both.toarray()).T, again.numpy())


def test_unknown_graphs_name_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'pubmed'"):
        load_graph("pubmet")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        load_graph(str(tmp_path))
    with pytest.raises(ValueError, match=r"root .* would be ignored"):
        load_graph(str(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError, match="set SPARSE_MLP_DATA"):
        load_graph("cora", tmp_path)


def test_a_planetoid_graph_needs_no_module_that_scipy_2_removes(data_root, monkeypatch):
    for gone in ("scipy.sparse.csr", "numpy.core", "numpy.core.multiarray"):
        monkeypatch.setitem(sys.modules, gone, None)  # an import of it fails
    with pytest.raises(ImportError):
        importlib.import_module("scipy.sparse.csr")
    assert load_graph("cora", data_root).num_nodes == 2708


# nodes, undirected edges, features, classes, training nodes: the counts torch_geometric documents
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cora", (2708, 5278, 1433, 7, 140)),
        ("citeseer", (3327, 4552, 3703, 6, 120)),
        ("pubmed", (19717, 44324, 500, 3, 60)),
        ("photo", (7650, 119081, 745, 8, 160)),
        ("computers", (13752, 245861, 767, 10, 200)),
        ("cs", (18333, 81894, 6805, 15, 300)),
        ("physics", (34493, 247962, 8415, 5, 100)),
    ],
)
def test_the_papers_graphs(data_root, name, counts):
    graph = load_graph(name, data_root)
    sizes = (graph.num_nodes, graph.num_edges, graph.features.shape[1], graph.num_classes)
    assert (*sizes, len(graph.splits["train"])) == counts
    sums = np.asarray(graph.features.sum(1)).reshape(-1)
    assert np.logical_or(np.abs(sums - 1) < 1e-4, sums == 0).all()


def test_a_file_of_text_is_no_graph(tmp_path):
    (tmp_path / "notes.pt").write_text("import os\n")
    with pytest.raises(ValueError, match=r"notes\.pt: refused: it is no file of torch's$"):
        load_graph(str(tmp_path / "notes.pt"))
