"""All-MLP vision models with conditional computation.

Importing the package has one effect: its models are in timm's registry, so that `timm.create_model` finds them.
"""

from sparse_mlp import models  # noqa: F401

__version__ = "0.1.0"
