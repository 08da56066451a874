"""Entry point of the command: runs the verb, and prints a user's mistake as one line."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from sparse_mlp.cli.help import MAIN, VERBS, help_for
from sparse_mlp.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit code: 0, 2 after a user's mistake, 128 + signal when stopped by one.

    A bug of this package keeps its traceback; with SPARSE_MLP_DEBUG=1 every error does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _show_log()
    try:
        return _dispatch(arguments)
    except BrokenPipeError:  # the reader of our output has left, as in `sparse-mlp models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        # The engine's errors carry an exit code. Their types are not imported here, as that would import torch.
        code = 2 if isinstance(error, UserError | OSError) else getattr(error, "exit_code", None)
        if code is None or os.environ.get("SPARSE_MLP_DEBUG") == "1":
            raise
        return _fail(_message(error), code)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [arguments[1], "--help"]
    text = help_for(arguments)
    if text is not None or not arguments:
        sys.stdout.write(text or MAIN)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from sparse_mlp import __version__

        sys.stdout.write(f"sparse-mlp {__version__}\n")
        return 0
    name = arguments[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=2)
        raise UserError(
            f"unknown verb {name!r}; " + (f"nearest: {', '.join(near)}" if near else "see sparse-mlp --help")
        )
    module = importlib.import_module(f"sparse_mlp.cli.{name}")
    return module.run(arguments[1:]) or 0


def _message(error: Exception) -> str:
    """The message of an error; for an error of the operating system the file and the reason, without the number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> int:
    kind = "" if code > 128 else "error: "  # a stop by a signal is not an error
    sys.stderr.write(f"sparse-mlp: {kind}{' '.join(message.split())}\n")
    return code


class _StandardError(logging.Handler):
    """Writes to what sys.stderr is at the time: a caller of `main` may have replaced or closed the one before."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"sparse-mlp: {record.getMessage()}\n")


def _show_log() -> None:
    """Show what the library logs, such as a skipped image."""
    logger = logging.getLogger("sparse_mlp")
    logger.handlers = [_StandardError()]
    logger.setLevel(logging.INFO)
