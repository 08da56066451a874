"""Entry point of the command: finds the subcommand, and turns a user's mistake into one line."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from sparse_mlp.errors import UserError

COMMANDS = {
    "train": "train a model by a recipe, into a run folder with metrics, checkpoints and a report",
    "pretrain": "pre-train a backbone by MoCo v3, without labels",
    "compare": "train several recipes one after the other and set their results side by side",
    "probe": "measure pre-trained features: linear probe and nearest neighbours",
    "finetune": "train a pre-trained model further, also on a share of the labels",
    "transfer": "fine-tune a pre-trained model on CIFAR-10 or CIFAR-100 by the published recipe",
    "export-backbone": "write a run's backbone as a file that plain timm loads",
    "headline": "the headline experiment: Sparse-MLP against dense Mixers at equal compute",
    "eval": "measure the accuracy of a run or of any model on a data set",
    "predict": "classify image files with a trained run",
    "report": "write the report of a run anew",
    "recipes": "list the recipes, or show one in full",
    "models": "list the models",
    "info": "parameters, multiply-adds and experts of a model, module by module",
    "nodes": "classify the nodes of a graph: train, eval, predict",
    "convert": "bring a published checkpoint into the layout of one of our models",
    "rebuild-cifar10": "write the official CIFAR-10 files from the lossless WebP layout",
}

_HELP = f"""usage: sparse-mlp COMMAND ...

All-MLP vision models with conditional computation: train, measure and look into them.

commands:
{chr(10).join(f"  {name:17} {what}" for name, what in COMMANDS.items())}

Each command explains itself: sparse-mlp COMMAND --help
To begin: sparse-mlp compare digits_sparse digits_mixer"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 after a user's mistake, 128 + signal when stopped by one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _show_warnings()
    try:
        return _dispatch(arguments)
    except BrokenPipeError:  # the reader of our output has left, as in `sparse-mlp models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        return _fail(_message(error), 2)
    except Exception as error:
        # The engine's errors carry the code to leave with; torch is not imported here to know them by type.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        return _fail(str(error), code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_HELP + "\n")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from sparse_mlp import __version__

        sys.stdout.write(f"sparse-mlp {__version__}\n")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=2)
        raise UserError(
            f"unknown command {name!r}; " + (f"nearest: {', '.join(near)}" if near else "see sparse-mlp --help")
        )
    module = importlib.import_module(f"sparse_mlp.cli.{name.replace('-', '_')}")
    return module.run(arguments[1:]) or 0


def _message(error: Exception) -> str:
    """What went wrong; of an error of the system's the file first, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> int:
    kind = "" if code > 128 else "error: "  # being stopped is no error
    sys.stderr.write(f"sparse-mlp: {kind}{' '.join(message.split())}\n")
    return code


def _show_warnings() -> None:
    """What the library logs, such as a skipped image, goes to standard error as it is now."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sparse-mlp: %(message)s"))
    logging.getLogger("sparse_mlp").handlers = [handler]
