"""The kinds of run, one file each; `run` starts, resumes and finishes runs of any kind."""

from sparse_mlp.jobs.job import Context, EvalOptions, Job, PredictOptions, Row
from sparse_mlp.jobs.kinds import job_type, register
from sparse_mlp.jobs.model import build_model, check_model_name, load_model, load_weights
from sparse_mlp.jobs.recipe import ModelConfig, Recipe, adjust_dependent, differences, from_json, override, to_json
from sparse_mlp.jobs.run import Run, check, check_resume, kind_of, resume, train
from sparse_mlp.jobs.summary import Summary, summarize

__all__ = [
    "Context",
    "EvalOptions",
    "Job",
    "ModelConfig",
    "PredictOptions",
    "Recipe",
    "Row",
    "Run",
    "Summary",
    "adjust_dependent",
    "build_model",
    "check",
    "check_model_name",
    "check_resume",
    "differences",
    "from_json",
    "job_type",
    "kind_of",
    "load_model",
    "load_weights",
    "override",
    "register",
    "resume",
    "summarize",
    "to_json",
    "train",
]
