"""Help texts: the verbs, and the most common options of each."""

from __future__ import annotations

from collections.abc import Sequence

VERBS = {
    "train": "run a recipe, or any model on your images, into a run folder",
    "eval": "measure a run, or any model with any weights, on a data set",
    "predict": "what a run sees in files",
    "report": "write the page of a run, or the page that compares several",
    "compare": "train several recipes and set their results side by side",
    "export": "write a run's model for timm, onnxruntime or torch without this package",
    "recipes": "list the recipes, or show one in full",
    "models": "list the models",
    "info": "parameters, multiply-adds and experts of a model, module by module",
    "convert": "bring a published checkpoint into the layout of one of our models",
}

MAIN = f"""usage: sparse-mlp VERB ...

All-MLP vision models with conditional computation: train, measure and look into them.

verbs:
{chr(10).join(f"  {name:9} {what}" for name, what in VERBS.items())}

Each verb explains itself: sparse-mlp VERB --help
To begin: sparse-mlp compare digits_sparse digits_mixer
"""

TRAIN = """usage: sparse-mlp train RECIPE [options]
       sparse-mlp train MODEL --data.root FOLDER [options]
       sparse-mlp train --resume RUN [options]

Run a recipe into a folder with metrics, checkpoints, predictions, weights and a report. RECIPE is one of
`sparse-mlp recipes`; MODEL is any model of timm, ours included, which is trained on a folder of your images (one
subfolder a class) with settings that fit them.

  sparse-mlp train digits_sparse
  sparse-mlp train cycle_mlp_b1 --data.root photos/
  sparse-mlp train linear_probe --model.weights runs/digits_moco_sparse
  sparse-mlp train cora
  sparse-mlp train segment --data.root scenes/
  torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_sparse_b --data.root /path/to/imagenet

options used most (every field of the recipe is one; `sparse-mlp train RECIPE --help-all` has them all):
  --out DIR                     folder of the run. Left out: runs/RECIPE, numbered if that exists
  --resume RUN                  go on with a run exactly where it was; also after its end, with a larger length
  --data.root DIR               where the images lie
  --data.name SET               digits, cifar10, cifar100, folder, or a name of timm's (torch/..., hfds/..., wds/...)
  --data.image-size PIXELS      side of the images that the model sees
  --data.batch-size N           images in a step; learning rates follow it in proportion
  --data.workers N              processes that read images
  --model.name MODEL            another model (sparse-mlp models)
  --model.args NAME=VALUE ...   its arguments: num_experts=(8,8) top_k=(1,1) drop_path_rate=0.1
  --model.weights RUN|FILE      start from these weights
  --model.pretrained            start from the weights that timm publishes
  --train.epochs N              length; or --train.steps N, or --train.minutes N
  --train.seed N                of everything random
  --train.amp bf16              mixed precision
  --train.ema-decay 0.999       keep an average of the weights, and evaluate it
  --train.device cpu|cuda       left out: a GPU where there is one
  --optim.lr RATE               learning rate
  --augment.mixup 0.2           and flip, crop-scale, auto-augment, erase, cutmix, ...

Ctrl-C saves; --resume goes on exactly where the run was.
"""

EVAL = """usage: sparse-mlp eval RUN [options]
       sparse-mlp eval MODEL (--checkpoint FILE | --pretrained) --data.name SET [options]

The metric of a run's kind, with its newest weights, on its own test data split as they were when it was trained. A
classifier can be measured on other images: their classes are matched by name.

  sparse-mlp eval runs/digits_sparse
  sparse-mlp eval mixer_b16_224 --pretrained --data.name folder --data.root imagenet/

options used most (`--help-all` has them all):
  --checkpoint FILE         other weights: a file (.safetensors, .pth, a published Mixer .npz) or a run folder
  --data.name, --data.root  other images
  --device cpu|cuda         left out: a GPU where there is one
  --trust-data              open data that the run names even if that can execute or fetch something
"""

COMPARE = """usage: sparse-mlp compare RECIPE|RUN RECIPE|RUN ... [options]

Train recipes one after the other and set their results side by side; finished runs are taken as they are. Called again,
it goes on where it was.

  sparse-mlp compare digits_sparse digits_mixer --seeds 3
  sparse-mlp compare runs/digits_sparse runs/digits_mixer

options used most (every field of the recipes is one, and changes all of them alike; `--help-all` has them):
  --out DIR            folder of the comparison, with a run folder for each recipe. Left out: runs/compare
  --seeds N            train each recipe with the seeds 0 to N - 1
  --train.epochs N     length of each; or --train.steps N, or --train.minutes N
"""

TEXTS = {"train": TRAIN, "eval": EVAL, "compare": COMPARE}


def help_for(arguments: Sequence[str]) -> str | None:
    """The help text that a command line requests; None if it is not one of those in this file."""
    requested = any(word in ("-h", "--help") for word in arguments)
    verb = arguments[0] if arguments else None
    if verb in ("-h", "--help", "help"):
        return MAIN
    return TEXTS.get(verb) if requested and verb else None
