"""Read the raw files of the Planetoid citation graphs (Cora, Citeseer, Pubmed) without executing code in them.

The files are Python 2 pickles, and a pickle may call any function. This reader admits the six names that the original
files use and refuses every other; matrices are collected as plain arrays, checked, and built by SciPy's public API, so
that SciPy 1 and 2 (which no longer has the module the pickles name) both work.

Source of the files: Yang, Cohen, Salakhutdinov, https://arxiv.org/abs/1603.08861, github.com/kimiyoung/planetoid
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from sparse_mlp.errors import UserError

__all__ = ["load_pickle", "read_planetoid"]


class _Matrix:
    """Stands in for `scipy.sparse.csr.csr_matrix`: keeps the state, does nothing with it."""


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What `numpy.core.multiarray._reconstruct` does for the empty array that every pickled array starts from."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array of an unusual kind")
    return np.ndarray.__new__(np.ndarray, (0,), np.int8)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("scipy.sparse.csr", "csr_matrix"): _Matrix,
    ("scipy.sparse._csr", "csr_matrix"): _Matrix,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "defaultdict"): defaultdict,
    ("__builtin__", "list"): list,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no Planetoid file does") from None


def load_pickle(path: Path) -> Any:
    """Read one file: a CSR matrix, an array or a dict of lists.

    Raises UserError where it is damaged, holds anything else, or would call a function.
    """
    try:
        with path.open("rb") as file:
            value = _Unpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; a Planetoid graph needs x, tx, allx, y, ty, ally, graph"
        ) from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise UserError(f"{path}: refused: {error}") from error
    if isinstance(value, _Matrix):
        return _matrix(value, path)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value
    if isinstance(value, dict):
        return value
    raise UserError(
        f"{path}: refused: a matrix, an array of numbers or a dict was expected, not {type(value).__name__}"
    )


def _matrix(state: _Matrix, path: Path) -> sp.csr_matrix:
    parts = vars(state)
    try:
        shape = parts["_shape"]
        arrays = [parts["data"], parts["indices"], parts["indptr"]]
        if not all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in arrays):
            raise UserError("its parts are not arrays of numbers")
        matrix = sp.csr_matrix((arrays[0], arrays[1], arrays[2]), shape=(int(shape[0]), int(shape[1])))
        matrix.check_format(full_check=True)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: refused: not a sparse matrix: {error}") from error
    return matrix


def read_planetoid(folder: Path, name: str) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Read `ind.NAME.*` in `folder`: features, edges (2, E), labels (-1 where none) and the ids of the public split."""
    x, tx, allx, y, ty, ally, graph = (
        load_pickle(folder / f"ind.{name}.{part}") for part in ("x", "tx", "allx", "y", "ty", "ally", "graph")
    )
    path = folder / f"ind.{name}.test.index"
    try:
        order = np.array([int(line) for line in path.read_text(encoding="utf-8").split()], dtype=np.int64)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not a list of node ids: {error}") from error
    if len(order) != tx.shape[0] or len(ty) != len(order) or allx.shape[0] != len(ally) or x.shape[0] != len(y):
        raise UserError(f"{folder}: the files of {name} disagree in the number of nodes")
    if (
        not len(order)
        or order.min() < allx.shape[0]
        or allx.shape[1] != tx.shape[1]
        or len(np.unique(order)) != len(order)
    ):
        raise UserError(f"{path}: node ids that repeat, overlap the training nodes or do not fit the features")
    nodes = int(order.max()) + 1
    # Citeseer: ids between the test ids that are in no file have no feature and no label
    place = sp.csr_matrix((np.ones(len(order), np.float32), (order, np.arange(len(order)))), (nodes, len(order)))
    indptr = np.concatenate([allx.indptr, np.full(nodes - allx.shape[0], allx.indptr[-1])])
    top = sp.csr_matrix((allx.data, allx.indices, indptr), shape=(nodes, allx.shape[1]))
    features = sp.csr_matrix(top + place @ tx, dtype=np.float32)
    labels = np.full(nodes, -1, np.int64)
    labels[: len(ally)] = np.where(ally.any(1), ally.argmax(1), -1)
    labels[order] = np.where(ty.any(1), ty.argmax(1), -1)
    try:
        source = np.concatenate([np.full(len(others), int(node)) for node, others in graph.items()])
        target = np.concatenate([np.asarray(others, dtype=np.int64) for others in graph.values()])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/ind.{name}.graph: not lists of node ids: {error}") from error
    splits = {
        "train": np.arange(len(y)),
        "val": np.arange(len(y), len(y) + 500),
        "test": np.sort(order),
    }
    return features, np.stack([source, target]), labels, splits
