"""The site builds without a network, and every link and reference in it leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # a build is half a minute
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?://[^\"]+)", page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"


def test_every_include_is_one() -> None:
    """A formatter of code that finds an include in a block takes it for an expression."""
    for page in (ROOT / "docs").rglob("*.md"):
        for line in page.read_text().splitlines():
            if "--8" in line:
                assert re.fullmatch(r'--8<-- "[^"]+"', line), f"{page.name}: {line}"


def test_pictures_of_pages_exist() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
