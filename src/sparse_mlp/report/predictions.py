"""The final predictions of a run: what predictions.npz holds, reduced, and the same as CSV."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torchmetrics.functional.classification import multiclass_accuracy

from sparse_mlp.errors import UserError
from sparse_mlp.files import replacing

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK = 8192  # rows of logits in float64 at a time


@dataclass(frozen=True)
class Predictions:
    """The final evaluation of N items.

    index: (N,) places in the test set, -1 in a stream. target: (N,) classes, negative where an item has no label.
    predicted: (N,) classes. probability: (N,) of the predicted class. top5: share of the labelled items whose class is
    among the first five, None without labelled items. file: names of the items' files, where they have any.
    """

    index: Ints
    target: Ints
    predicted: Ints
    probability: Floats
    num_classes: int
    top5: float | None = None
    file: list[str] | None = None

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.predicted == self.target

    def name(self, row: int) -> str:
        """Return how a reader finds the item: its file, else its number in the test set."""
        if self.file is not None:
            return self.file[row]
        return f"#{self.index[row]}" if self.index[row] >= 0 else ""

    def labelled(self) -> Predictions:
        """Return the items that have a label."""
        rows = np.flatnonzero(self.target >= 0)
        if len(rows) == len(self.target):
            return self
        columns = {name: getattr(self, name)[rows] for name in ("index", "target", "predicted", "probability")}
        return replace(self, **columns, file=None if self.file is None else [self.file[row] for row in rows])


def reduce_predictions(arrays: Mapping[str, NDArray[Any]], source: str = "predictions") -> Predictions:
    """Reduce `index` (N,), `target` (N,), `logits` (N, C) and, where it is there, `files` (N,).

    UserError, which names `source`, for shapes that do not fit each other or targets that are no classes.
    """
    index, target, logits = (arrays[name] for name in ("index", "target", "logits"))
    file = [str(name) for name in arrays["files"]] if "files" in arrays else None
    sizes = {len(index), len(target), len(logits), len(target if file is None else file)}
    if logits.ndim != 2 or len(sizes) != 1:
        raise UserError(f"{source}: index {index.shape}, target {target.shape} and logits {logits.shape} do not fit")
    if len(target) and target.max() >= logits.shape[1]:
        raise UserError(f"{source}: targets {target.min()} to {target.max()} do not fit {logits.shape[1]} classes")
    parts = (logits[start : start + _CHUNK].astype(np.float64) for start in range(0, len(logits), _CHUNK))
    probability = [np.exp(part.max(axis=1) - logsumexp(part, axis=1)) for part in parts]
    return Predictions(
        index=index.astype(np.int64),
        target=target.astype(np.int64),
        predicted=logits.argmax(axis=1).astype(np.int64) if len(logits) else np.zeros(0, np.int64),
        probability=np.concatenate(probability or [np.zeros(0)]),
        num_classes=logits.shape[1],
        top5=_top5(target, logits),
        file=file,
    )


def _top5(target: NDArray[Any], logits: NDArray[Any]) -> float | None:
    if not (target >= 0).any():
        return None
    if logits.shape[1] <= 5:
        return 1.0
    scores, labels = torch.from_numpy(logits).float(), torch.from_numpy(np.maximum(target, -1)).long()
    return float(multiclass_accuracy(scores, labels, logits.shape[1], average="micro", top_k=5, ignore_index=-1))


def read_arrays(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Arrays of a predictions.npz by name. UserError, one line, for a file that does not hold them."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in [*names, *(name for name in optional if name in archive)]}
    except (ValueError, KeyError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a predictions file: {' '.join(str(error).split())}") from error


def read_predictions(path: Path, *, classes: bool = True) -> Predictions | None:
    """Read predictions.npz. Where the run need not have predicted `classes`, None for a file without logits."""
    names = ("index", "target", "logits")
    arrays = read_arrays(path, names, ("files",)) if classes else read_arrays(path, (), (*names, "files"))
    if "logits" not in arrays:
        return None
    if absent := [name for name in names if name not in arrays]:
        raise UserError(f"{path} is not a predictions file: it has no {absent[0]!r}")
    return reduce_predictions(arrays, str(path))


def write_predictions_csv(
    path: Path | str, predictions: Mapping[str, NDArray[Any]] | Predictions, class_names: Sequence[str] | None = None
) -> Path:
    """Write one line an item: `file` (without names `index`), `target`, `predicted`, `probability`, `correct`.

    Args:
        path: the file to write.
        predictions: the arrays of predictions.npz, or what `reduce_predictions` returns for them.
        class_names: names of all classes; default their numbers. An item without a label has an empty target.

    Returns the path. UserError if the names are not as many as the classes.
    """
    reduced = predictions if isinstance(predictions, Predictions) else reduce_predictions(predictions)
    names = [str(c) for c in range(reduced.num_classes)] if class_names is None else list(class_names)
    if len(names) != reduced.num_classes:
        raise UserError(f"{path}: predictions of {reduced.num_classes} classes, but {len(names)} class names are given")
    first = reduced.index.tolist() if reduced.file is None else reduced.file
    # A file name that is not UTF-8 gets its own bytes back.
    with (
        replacing(Path(path)) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["index" if reduced.file is None else "file", "target", "predicted", "probability", "correct"])
        for item, target, guess, share in zip(
            first, reduced.target, reduced.predicted, reduced.probability, strict=True
        ):
            known = [names[target], str(target == guess).lower()] if target >= 0 else ["", ""]
            writer.writerow([item, known[0], names[guess], f"{share:.6f}", known[1]])
    return Path(path)
