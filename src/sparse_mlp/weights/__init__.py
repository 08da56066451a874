"""Load weights in any published layout, and convert them to the layouts of our models."""

from sparse_mlp.weights.convert import convert, convert_file
from sparse_mlp.weights.fewer_experts import merge_experts, prune_experts
from sparse_mlp.weights.fit import CheckpointMismatch, add_batch_counters, check_fit, shapes
from sparse_mlp.weights.load import classifier_names, load
from sparse_mlp.weights.moments import carry_over
from sparse_mlp.weights.openmmlab import head_from_mmseg
from sparse_mlp.weights.read import adapt, have_experts, read_file
from sparse_mlp.weights.upcycle import sparsify
from sparse_mlp.weights.write import write_file

__all__ = [
    "CheckpointMismatch",
    "adapt",
    "add_batch_counters",
    "carry_over",
    "check_fit",
    "classifier_names",
    "convert",
    "convert_file",
    "have_experts",
    "head_from_mmseg",
    "load",
    "merge_experts",
    "prune_experts",
    "read_file",
    "shapes",
    "sparsify",
    "write_file",
]
