"""The numbers behind the figures: confusion, accuracy per class, calibration, balance. No drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binned_statistic, binomtest
from sklearn.metrics import confusion_matrix as count_pairs

from sparse_mlp.report.predictions import Floats, Ints, Predictions

DEAD = 0.05  # an expert with less than this share of its fair load counts as dead


def confusion_matrix(predictions: Predictions) -> Ints:
    """Return counts (classes, classes); row = true class, column = predicted class."""
    size = predictions.num_classes
    if size == 1:  # scikit-learn suspects a mistake
        return np.array([[len(predictions.target)]])
    return count_pairs(predictions.target, predictions.predicted, labels=np.arange(size))


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy per class with its 95 % interval; `order` lists the classes that occur, best first."""

    accuracy: Floats
    low: Floats
    high: Floats
    images: Ints
    order: Ints


def class_accuracy(confusion: Ints) -> ClassAccuracy:
    """Return the accuracy of every class (NaN where it has no image) with Wilson's 95 % interval (Wilson 1927)."""
    images, right = confusion.sum(axis=1), np.diag(confusion)
    accuracy, low, high = (np.full(len(images), np.nan) for _ in range(3))
    present = np.flatnonzero(images)
    for c in present:
        accuracy[c] = right[c] / images[c]
        low[c], high[c] = binomtest(int(right[c]), int(images[c])).proportion_ci(0.95, method="wilson")
    order = present[np.lexsort((present, -accuracy[present]))]
    return ClassAccuracy(accuracy, low, high, images, order)


@dataclass(frozen=True)
class Pair:
    """One kind of mistake: `count` of the `images` of class `true` were taken for `predicted`."""

    true: int
    predicted: int
    count: int
    images: int


def worst_pairs(confusion: Ints, limit: int) -> list[Pair]:
    """Return the most frequent mistakes, most frequent first."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    images, found = confusion.sum(axis=1), np.argwhere(mistakes > 0)
    ranked = sorted(((int(t), int(p)) for t, p in found), key=lambda tp: (-mistakes[tp], tp))
    return [Pair(t, p, int(mistakes[t, p]), int(images[t])) for t, p in ranked[:limit]]


def confused_classes(confusion: Ints, limit: int) -> Ints:
    """Return at most `limit` classes, the ones in the most frequent mistakes, in ascending order."""
    if len(confusion) <= limit:
        return np.arange(len(confusion))
    chosen: set[int] = set()
    for pair in worst_pairs(confusion, limit * limit):
        if len(chosen | {pair.true, pair.predicted}) > limit:
            break
        chosen |= {pair.true, pair.predicted}
    return np.array(sorted(chosen), dtype=np.int64)


def mistakes_of(predictions: Predictions, pair: Pair, limit: int) -> Ints:
    """Return positions of up to `limit` images of this mistake, the surest first."""
    rows = np.flatnonzero((predictions.target == pair.true) & (predictions.predicted == pair.predicted))
    return rows[np.argsort(-predictions.probability[rows], kind="stable")][:limit]


@dataclass(frozen=True)
class Calibration:
    """Images binned by the winner's probability, NaN in empty bins; `error` is the expected calibration error."""

    confidence: Floats
    accuracy: Floats
    images: Ints
    edges: Floats
    error: float


def calibration(predictions: Predictions, bins: int = 10) -> Calibration:
    """Return the reliability of the probabilities in equal bins over 0..1 (Guo et al. 2017, equation 3)."""
    columns = [predictions.probability, predictions.correct.astype(np.float64)]
    found = binned_statistic(predictions.probability, columns, "mean", bins, (0, 1))
    images, _ = np.histogram(predictions.probability, bins, (0, 1))
    confidence, accuracy = found.statistic
    error = float(np.nansum(np.abs(accuracy - confidence) * images) / max(1, images.sum()))
    return Calibration(confidence, accuracy, images, found.bin_edges, error)


@dataclass(frozen=True)
class Balance:
    """How evenly a layer uses its experts: `busiest` and `quietest` are loads times E (1 = fair), `dead` the idle."""

    busiest: float
    quietest: float
    dead: list[int]
    num_experts: int

    def sentence(self) -> str:
        """Say it in one line of English."""
        if self.num_experts == 1:
            return "A single expert, so there is nothing to balance."
        idle = "no expert is idle" if not self.dead else f"idle: {', '.join(f'expert {e}' for e in self.dead)}"
        extremes = f"The busiest expert takes {self.busiest:.2f} times its fair share, the quietest {self.quietest:.2f}"
        return f"{extremes}; {idle}."


def balance(load: Sequence[float] | Floats) -> Balance:
    """Measure how even the load (E,) of a layer is; an expert under 5 % of its fair share counts as dead."""
    relative = np.asarray(load, dtype=np.float64) * len(load)
    dead = [int(e) for e in np.flatnonzero(relative < DEAD)]
    return Balance(float(relative.max()), float(relative.min()), dead, len(relative))
