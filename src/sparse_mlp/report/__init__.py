"""Figures and the HTML report of a run, and of several runs side by side."""

from sparse_mlp.report.classification import write_classification_report
from sparse_mlp.report.compare import write_comparison
from sparse_mlp.report.explore import images_to_explore
from sparse_mlp.report.own import write_routing_report
from sparse_mlp.report.plain import write_plain_report
from sparse_mlp.report.predictions import Predictions, reduce_predictions, write_predictions_csv
from sparse_mlp.report.run import RunData, read_run
from sparse_mlp.report.samples import Samples, wanted_images
from sparse_mlp.report.style import save_png
from sparse_mlp.report.vocabulary import ImageSource

__all__ = [
    "ImageSource",
    "Predictions",
    "RunData",
    "Samples",
    "images_to_explore",
    "read_run",
    "reduce_predictions",
    "save_png",
    "wanted_images",
    "write_classification_report",
    "write_comparison",
    "write_plain_report",
    "write_predictions_csv",
    "write_routing_report",
]
