"""The command `sparse-mlp`: its help without importing torch and timm (seconds), all else by `sparse_mlp.cli`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> int:
    """Run the command; returns its exit code."""
    texts = runpy.run_path(str(Path(__file__).with_name("sparse_mlp") / "cli" / "help.py"))
    text = texts["help_for"](sys.argv[1:])
    if text is not None:
        sys.stdout.write(text)
        return 0
    from sparse_mlp.cli.main import main as run

    return run()
