"""Graphs from files: nothing is fetched, and no code in a file runs.

Reads Planetoid files, the npz files of Shchur et al. (https://arxiv.org/abs/1811.05868), `torch_geometric.data.Data`
(in memory, or saved with `torch.save`) and folders of OGB's raw text files.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from sparse_mlp.data.graphs import Graph, from_arrays, random_split
from sparse_mlp.data.planetoid import read_planetoid
from sparse_mlp.errors import UserError

__all__ = ["NAMES", "from_data", "load_graph"]

_NPZ = {
    "photo": "amazon_electronics_photo",
    "computers": "amazon_electronics_computers",
    "cs": "ms_academic_cs",
    "physics": "ms_academic_phy",
}
NAMES = ("cora", "citeseer", "pubmed", *_NPZ)


def load_graph(
    source: str, root: Path | None = None, *, split_seed: int = 0, row_normalize: bool | None = None
) -> Graph:
    """A graph by name, or a folder or file.

    Names are looked for below `root` (or $SPARSE_MLP_DATA): the citation graphs with their public split, the others
    with a random one of 20 training and 30 validation nodes per class. A folder may hold Planetoid's files, one npz of
    Shchur et al., `data.pt` (a saved `Data`, read with `weights_only=True`) or OGB's `raw/` and `split/`.
    `row_normalize` divides each node's features by their sum; None does so for Planetoid and Shchur et al. only.
    """
    if source.lower() in NAMES:
        root = root or Path(os.environ.get("SPARSE_MLP_DATA", "data"))
        name = source.lower()
        if name in _NPZ:
            return random_split(_read_npz(_find(root, f"{_NPZ[name]}.npz"), name, row_normalize), split_seed)
        path = _find(root, f"ind.{name}.graph")
        return _planetoid(path.parent, name, split_seed, row_normalize)
    folder = Path(source)
    if root is not None and folder.exists():
        raise UserError(f"root {root} would be ignored: {source} is a folder or file, not a named graph")
    if not folder.exists():
        near = difflib.get_close_matches(source.lower(), NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"{source!r} is neither a graph ({', '.join(NAMES)}) nor a folder{hint}")
    return _read_folder(folder, split_seed, row_normalize)


def _find(root: Path, name: str) -> Path:
    places = [root, *(root / part for part in ("planetoid", "gnn-benchmark", "raw"))]
    places += [root / part / "raw" for part in ("Cora", "CiteSeer", "PubMed", "Photo", "Computers", "CS", "Physics")]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{name} not found in {root} or its planetoid/, gnn-benchmark/, raw/; set SPARSE_MLP_DATA")


def _read_folder(folder: Path, split_seed: int, row_normalize: bool | None) -> Graph:
    if folder.is_file() and folder.suffix == ".npz":
        return random_split(_read_npz(folder, folder.stem, row_normalize), split_seed)
    if folder.is_file():
        return _read_saved(folder, split_seed, bool(row_normalize))
    for place in (folder, folder / "raw"):
        if planetoid := sorted(place.glob("ind.*.graph")):
            name = planetoid[0].name.split(".")[1]
            return _planetoid(place, name, split_seed, row_normalize)
        if archives := sorted(place.glob("*.npz")):
            return random_split(_read_npz(archives[0], archives[0].stem, row_normalize), split_seed)
        if (place / "edge.csv.gz").is_file():
            return _read_ogb(place, folder, split_seed, bool(row_normalize))
    for saved in (folder / "data.pt", folder / "processed" / "data.pt"):
        if saved.is_file():
            return _read_saved(saved, split_seed, bool(row_normalize))
    raise FileNotFoundError(f"{folder} holds none of ind.NAME.graph, *.npz, data.pt, raw/edge.csv.gz")


def _planetoid(folder: Path, name: str, split_seed: int, row_normalize: bool | None) -> Graph:
    graph = from_arrays(name, *read_planetoid(folder, name), row_normalize=row_normalize is not False)
    return _split(graph, split_seed)


def _split(graph: Graph, seed: int) -> Graph:
    """The graph with the split it brought, or a random one."""
    if not graph.splits:
        return random_split(graph, seed)
    if seed:
        raise UserError(f"split_seed {seed} would be ignored: {graph.name} brings its split")
    return graph


def _read_npz(path: Path, name: str, row_normalize: bool | None) -> Graph:
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {key: file[key] for key in file.files}
        features = _csr(parts, "attr")
        adjacency = _csr(parts, "adj").tocoo()
        labels = parts["labels"].astype(np.int64)
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


def _read_saved(path: Path, split_seed: int, row_normalize: bool) -> Graph:
    try:
        from torch_geometric.data import data, storage
    except ImportError as error:
        raise UserError(
            f"{path}: reading a saved Data needs torch_geometric: pip install 'sparse-mlp[graph]'"
        ) from error
    try:
        plain = [data.Data, data.DataEdgeAttr, data.DataTensorAttr, storage.GlobalStorage]
        with torch.serialization.safe_globals(plain):  # classes that hold tensors; any other is refused
            saved = torch.load(path, weights_only=True)
    except Exception as error:  # pickle and torch raise several kinds
        named = re.search(
            r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error)
        )  # torch's own advice is to trust it
        why = f"it names {named[1]}, which no graph needs" if named else str(error).splitlines()[0]
        raise UserError(f"{path}: refused: {why}") from error
    if isinstance(saved, tuple):  # torch_geometric's InMemoryDataset: (data or its dict, slices, class)
        saved = saved[0]
    return from_data(saved, path.parent.name, row_normalize=row_normalize, split_seed=split_seed)


def from_data(data: Any, name: str = "graph", *, row_normalize: bool = False, split_seed: int = 0) -> Graph:
    """From a `torch_geometric.data.Data` (or a dict with its keys): x, edge_index, y and, if there, *_mask.

    Masks of several columns hold several splits; `split_seed` says which one.
    """
    get = data.get if isinstance(data, dict) else lambda key: getattr(data, key, None)
    x, edge_index, y = (get(key) for key in ("x", "edge_index", "y"))
    if x is None or edge_index is None or y is None:
        raise UserError(f"{name}: a graph needs x, edge_index and y")
    if edge_index.is_floating_point():
        raise UserError(f"{name}: edge_index holds node ids, but is of type {edge_index.dtype}")
    splits, columns = {}, 0
    for split in ("train", "val", "test"):
        mask = get(f"{split}_mask")
        if mask is None:
            continue
        if len(mask) != x.shape[0]:
            raise UserError(f"{name}: {split}_mask has {len(mask)} entries for the features of {x.shape[0]} nodes")
        if mask.ndim == 2:  # several splits, one a column
            columns = mask.shape[1]
            if not 0 <= split_seed < columns:
                raise UserError(
                    f"{name}: split_seed {split_seed} given, but {split}_mask has columns 0 to {columns - 1}"
                )
            mask = mask[:, split_seed]
        splits[split] = mask.nonzero()[:, 0].numpy()
    arrays = x.to_dense().float().numpy(), edge_index.numpy(), y.reshape(-1).long().numpy()
    graph = from_arrays(name, *arrays, splits, row_normalize=row_normalize)
    return graph if columns else _split(graph, split_seed)


def _read_ogb(raw: Path, folder: Path, split_seed: int, row_normalize: bool) -> Graph:
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
    arrays = table("node-feat", np.float32), table("edge", np.int64).T, table("node-label", np.float64).reshape(-1)
    labels = np.nan_to_num(arrays[2], nan=-1).astype(np.int64)
    graph = from_arrays(folder.name, arrays[0], arrays[1], labels, splits, row_normalize=row_normalize)
    return _split(graph, split_seed)
