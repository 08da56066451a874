"""What is learned: from a batch to a loss and metrics."""

from sparse_mlp.tasks.classify import Classify, ClassifyConfig
from sparse_mlp.tasks.features import extract_features
from sparse_mlp.tasks.knn import weighted_knn
from sparse_mlp.tasks.probe import Probe

__all__ = ["Classify", "ClassifyConfig", "Probe", "extract_features", "weighted_knn"]
