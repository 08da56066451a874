"""Load weights in any published layout, and convert them to the layouts of our models."""

from sparse_mlp.weights.convert import convert, convert_file
from sparse_mlp.weights.fewer_experts import merge_experts, prune_experts
from sparse_mlp.weights.fit import CheckpointMismatch, check_fit
from sparse_mlp.weights.load import load
from sparse_mlp.weights.read import have_experts
from sparse_mlp.weights.upcycle import sparsify

__all__ = [
    "CheckpointMismatch",
    "check_fit",
    "convert",
    "convert_file",
    "have_experts",
    "load",
    "merge_experts",
    "prune_experts",
    "sparsify",
]
