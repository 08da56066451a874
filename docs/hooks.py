"""Puts the command's own help into the reference: `{{ help NAME }}` on a line of its own."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

TEXTS = runpy.run_path(str(Path(__file__).parents[1] / "src" / "sparse_mlp" / "cli" / "help.py"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^\{\{ help (\w+) \}\}$", lambda match: f"```text\n{TEXTS[match[1]]}```", markdown, flags=re.M)
