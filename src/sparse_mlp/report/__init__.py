"""Figures and the HTML report of a run, and of several runs side by side."""

from sparse_mlp.report.compare import write_comparison
from sparse_mlp.report.plain import write_plain_report
from sparse_mlp.report.predictions import Predictions, reduce_predictions, write_predictions_csv
from sparse_mlp.report.report import write_report
from sparse_mlp.report.run import Run, read_run
from sparse_mlp.report.samples import Samples, wanted_images
from sparse_mlp.report.style import save_png

__all__ = [
    "Predictions",
    "Run",
    "Samples",
    "read_run",
    "reduce_predictions",
    "save_png",
    "wanted_images",
    "write_comparison",
    "write_plain_report",
    "write_predictions_csv",
    "write_report",
]
