"""What is learned: from a batch to a loss and metrics."""

from sparse_mlp.tasks.classify import Classify, ClassifyConfig

__all__ = ["Classify", "ClassifyConfig"]
