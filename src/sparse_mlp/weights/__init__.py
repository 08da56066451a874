"""Published weights in, ours out."""

from sparse_mlp.weights.convert import CheckpointMismatch, convert, convert_file
from sparse_mlp.weights.load import load

__all__ = ["CheckpointMismatch", "convert", "convert_file", "load"]
