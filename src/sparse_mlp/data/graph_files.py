"""Graphs from files: nothing is fetched, and no code in a file runs.

Reads Planetoid files, the npz files of Shchur et al. (https://arxiv.org/abs/1811.05868), `torch_geometric.data.Data`
(in memory, or saved with `torch.save`) and folders of OGB's raw text files.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from sparse_mlp.data.graphs import Graph, from_arrays, random_split
from sparse_mlp.data.planetoid import read_planetoid
from sparse_mlp.errors import UserError

__all__ = ["NAMES", "Split", "check_features", "from_data", "load_graph", "read_features"]

_NPZ = {
    "photo": "amazon_electronics_photo",
    "computers": "amazon_electronics_computers",
    "cs": "ms_academic_cs",
    "physics": "ms_academic_phy",
}
NAMES = ("cora", "citeseer", "pubmed", *_NPZ)


@dataclass(frozen=True)
class Split:
    """The split of the nodes: drawn at random where the data have none."""

    seed: int = 0
    """Of the random split; where masks have several columns, the column."""

    train: int = 20
    """Training nodes of each class."""

    val: int = 30
    """Validation nodes of each class; the others that have a label are for testing."""

    def apply(self, graph: Graph) -> Graph:
        """The graph with the split it brought, or a random one. UserError where this one would be ignored."""
        if not graph.splits:
            return random_split(graph, self.seed, self.train, self.val)
        self.check_unused(graph.name, self.seed)
        return graph

    def check_unused(self, name: str, seed: int = 0) -> None:
        """UserError unless everything but the column, which is used, is as it is if nothing is given."""
        given = {"split_seed": seed, "train_per_class": self.train, "val_per_class": self.val}
        default = {"split_seed": 0, "train_per_class": Split.train, "val_per_class": Split.val}
        for field, value in given.items():
            if value != default[field]:
                raise UserError(f"{field} {value} would be ignored: {name} brings its split")


def load_graph(
    source: str, root: Path | None = None, *, split: Split | None = None, row_normalize: bool | None = None
) -> Graph:
    """A graph by name, or a folder or file.

    Names are looked for below `root` (or $SPARSE_MLP_DATA): the citation graphs with their public split, the others
    with a random one. A folder may hold Planetoid's files, one npz of Shchur et al., `data.pt` (a saved `Data`, read
    with `weights_only=True`) or OGB's `raw/` and `split/`. `row_normalize` divides each node's features by their sum;
    None does so for Planetoid and Shchur et al. only.
    """
    split = split or Split()
    if source.lower() in NAMES:
        root = root or Path(os.environ.get("SPARSE_MLP_DATA", "data"))
        name = source.lower()
        if name in _NPZ:
            return split.apply(_read_npz(_find(root, f"{_NPZ[name]}.npz"), name, row_normalize))
        path = _find(root, f"ind.{name}.graph")
        return split.apply(_planetoid(path.parent, name, row_normalize))
    path = Path(source)
    if root is not None and path.exists():
        raise UserError(f"root {root} would be ignored: {source} is a folder or file, not a named graph")
    if not source or not path.exists():
        near = difflib.get_close_matches(source.lower(), NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"{source!r} is neither a graph ({', '.join(NAMES)}) nor a folder or file{hint}")
    if path.is_file() and path.suffix == ".npz":
        return split.apply(_read_npz(path, path.stem, row_normalize))
    if path.is_file():
        return _read_saved(path, split, bool(row_normalize))
    return _read_folder(path, split, row_normalize)


def _find(root: Path, name: str) -> Path:
    places = [root, *(root / part for part in ("planetoid", "gnn-benchmark", "raw"))]
    places += [root / part / "raw" for part in ("Cora", "CiteSeer", "PubMed", "Photo", "Computers", "CS", "Physics")]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{name} not found in {root} or its planetoid/, gnn-benchmark/, raw/; set SPARSE_MLP_DATA")


def _read_folder(folder: Path, split: Split, row_normalize: bool | None) -> Graph:
    for place in (folder, folder / "raw"):
        if planetoid := sorted(place.glob("ind.*.graph")):
            name = planetoid[0].name.split(".")[1]
            return split.apply(_planetoid(place, name, row_normalize))
        if archives := sorted(place.glob("*.npz")):
            return split.apply(_read_npz(archives[0], archives[0].stem, row_normalize))
        if (place / "edge.csv.gz").is_file():
            return split.apply(_read_ogb(place, folder, bool(row_normalize)))
    for saved in (folder / "data.pt", folder / "processed" / "data.pt"):
        if saved.is_file():
            return _read_saved(saved, split, bool(row_normalize))
    raise FileNotFoundError(f"{folder} holds none of ind.NAME.graph, *.npz, data.pt, raw/edge.csv.gz")


def _planetoid(folder: Path, name: str, row_normalize: bool | None) -> Graph:
    return from_arrays(name, *read_planetoid(folder, name), row_normalize=row_normalize is not False)


def _read_npz(path: Path, name: str, row_normalize: bool | None) -> Graph:
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {key: file[key] for key in file.files}
        features = _csr(parts, "attr")
        adjacency = _csr(parts, "adj").tocoo()
        labels = parts["labels"]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a graph of adj_*, attr_* and labels: {error}") from error
    if name in ("cs", "physics") or "ms_academic" in name:
        features.data[:] = 1  # word counts; torch_geometric's Coauthor does the same
    edges = np.stack([adjacency.row, adjacency.col])
    return from_arrays(name, features, edges, labels, {}, row_normalize=row_normalize is not False)


def _csr(parts: dict[str, np.ndarray], kind: str) -> sp.csr_matrix:
    arrays = tuple(parts[f"{kind}_{part}"] for part in ("data", "indices", "indptr"))
    matrix = sp.csr_matrix(arrays, shape=tuple(parts[f"{kind}_shape"]))
    matrix.check_format(full_check=True)
    return matrix


def _read_saved(path: Path, split: Split, row_normalize: bool) -> Graph:
    try:
        with (
            warnings.catch_warnings()
        ):  # torch_geometric scripts functions while it is imported, which torch deprecates
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            from torch_geometric.data import data, hetero_data, storage
    except ImportError as error:
        raise UserError(
            f"{path}: reading a saved Data needs torch_geometric: pip install 'sparse-mlp[graph]'"
        ) from error
    plain: list[Any] = [data.Data, data.DataEdgeAttr, data.DataTensorAttr, hetero_data.HeteroData, torch.nn.Parameter]
    plain += [storage.GlobalStorage, storage.NodeStorage, storage.EdgeStorage, storage.BaseStorage]
    try:
        # Only these classes, which hold tensors, are loaded.
        with torch.serialization.safe_globals(plain), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle and torch raise several kinds
        named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))  # torch's own advice: trust it
        why = f"it names {named[1]}, which no graph needs" if named else str(error).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError) and not named:
            why = "it is no file of torch's"
        raise UserError(f"{path}: refused: {why}") from error
    name = path.parent.name if path.name == "data.pt" else path.stem
    return from_data(_one_graph(saved, path), name, row_normalize=row_normalize, split=split)


def _one_graph(saved: Any, path: Path) -> Any:
    """The only graph in what a file holds. UserError if there are several."""
    if isinstance(saved, tuple):  # torch_geometric's InMemoryDataset: (data or its dict, slices, class)
        saved, slices = saved[0], saved[1] if len(saved) > 1 else None
        several = [
            len(ends) - 1 for ends in (slices or {}).values() if isinstance(ends, torch.Tensor) and len(ends) > 2
        ]
        count = max(several, default=1)
    else:
        count = len(saved) if isinstance(saved, list) else 1
        saved = saved[0] if isinstance(saved, list) and count == 1 else saved
    if count != 1:
        raise UserError(f"{path} holds {count} graphs, but the nodes of one are learned; save the one alone")
    return saved


def from_data(data: Any, name: str = "graph", *, row_normalize: bool = False, split: Split | None = None) -> Graph:
    """From a `torch_geometric.data.Data` (or a dict with its keys), on any device.

    Read are x, edge_index (or adj_t, as `ToSparseTensor` leaves it), y (class numbers or one-hot; negative or NaN: no
    label) and, if there, *_mask. Masks of several columns hold several splits; `split.seed` says which one.
    """
    split = split or Split()
    if hasattr(data, "node_types"):
        kinds = ", ".join(map(str, data.node_types))
        raise UserError(
            f"{name}: a HeteroData with nodes of the types {kinds}, but nodes of one type are learned; save "
            "data.to_homogeneous(), or a Data with the x, y and edge_index of one type"
        )
    get = data.get if isinstance(data, dict) else lambda key: getattr(data, key, None)
    x, y, edges = get("x"), get("y"), _edges(get)
    if x is None or y is None or edges is None:
        raise UserError(f"{name}: a graph needs x, edge_index and y")
    if edges.is_floating_point():
        raise UserError(f"{name}: edge_index holds node ids, but is of type {edges.dtype}")
    splits, columns = {}, 0
    for part in ("train", "val", "test"):
        mask = get(f"{part}_mask")
        if mask is None:
            continue
        if len(mask) != x.shape[0]:
            raise UserError(f"{name}: {part}_mask has {len(mask)} entries for the features of {x.shape[0]} nodes")
        if mask.ndim == 2:  # several splits, one a column
            columns = mask.shape[1]
            if not 0 <= split.seed < columns:
                raise UserError(
                    f"{name}: split_seed {split.seed} given, but {part}_mask has columns 0 to {columns - 1}"
                )
            mask = mask[:, split.seed]
        splits[part] = mask.nonzero()[:, 0].cpu().numpy()
    features = x.detach().cpu().to_dense().float().numpy()
    graph = from_arrays(
        name, features, edges.cpu().numpy(), y.detach().cpu().numpy(), splits, row_normalize=row_normalize
    )
    if columns:
        split.check_unused(name)
        return graph
    return split.apply(graph)


def _edges(get: Callable[[str], Any]) -> torch.Tensor | None:
    """Edges (2, E) of `edge_index`, or of the sparse matrix `adj_t` or `adj`: their direction does not matter."""
    if get("edge_index") is not None:
        return get("edge_index")
    adjacency = next((matrix for matrix in (get("adj_t"), get("adj")) if matrix is not None), None)
    if adjacency is None:
        return None
    if hasattr(adjacency, "coo"):  # torch_sparse's SparseTensor
        row, column, _ = adjacency.coo()
        return torch.stack([row, column])
    return adjacency.to_sparse_coo().coalesce().indices()


def _read_ogb(raw: Path, folder: Path, row_normalize: bool) -> Graph:
    def table(name: str, dtype: Any) -> np.ndarray:
        path = raw / f"{name}.csv.gz"
        try:
            return np.loadtxt(path, delimiter=",", dtype=dtype, ndmin=2)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    splits = {}
    for split, stem in (("train", "train"), ("val", "valid"), ("test", "test")):
        for path in sorted((folder / "split").glob(f"*/{stem}.csv.gz")):
            splits[split] = np.loadtxt(path, dtype=np.int64, ndmin=1)
    arrays = table("node-feat", np.float32), table("edge", np.int64).T, table("node-label", np.float64)
    return from_arrays(folder.name, *arrays, splits, row_normalize=row_normalize)


def read_features(path: Path, width: int) -> sp.csr_matrix | np.ndarray:
    """Features (N, width) of a .npy, .npz (scipy.sparse.save_npz) or .csv file, checked."""
    try:
        if path.suffix == ".npz":
            features = sp.csr_matrix(sp.load_npz(path), dtype=np.float32)
        elif path.suffix == ".npy":
            features = np.load(path, allow_pickle=False).astype(np.float32)
        elif path.suffix == ".csv":
            features = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
        else:
            raise UserError("features are read from .npy, .npz (scipy.sparse.save_npz) and .csv")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of features {path}") from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
    check_features(features, width, str(path))
    return features


def check_features(features: Any, width: int, name: str) -> None:
    """UserError for features of another width than the model's, or that are not finite."""
    if features.ndim != 2 or features.shape[1] != width:
        raise UserError(f"{name}: features of shape {features.shape}, but the run was trained on {width} a node")
    if not np.isfinite(features.data if sp.issparse(features) else features).all():
        raise UserError(f"{name}: features are NaN or infinite")
