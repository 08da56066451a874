"""The programs that measure what no test machine has run here too, at toy sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # compiles models
def test_every_part_of_the_gpu_program_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run("benchmarks/gpu.py", "--device", "cpu", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads(file.read_text())["parts"]
    assert len(parts) == 7 and all(rows for rows in parts.values())
    (layer, *_), (_, sparse) = (rows for title, rows in parts.items() if title.startswith(("Layer: ", "Training")))
    assert layer["dropless"] > 0 and layer["capacity"] > 0 and sparse["per multiply-add"] > 0
    assert "GB dense" not in layer, "nobody counts memory on a CPU: absent, not zero"
    assert done.stdout.count("## ") == 7 and "failed" not in done.stdout.replace("0 failed", "")


@pytest.mark.slow  # the same
def test_what_the_time_was_over_for_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run("benchmarks/gpu.py", "--device", "cpu", "--quick", "--minutes", "0", "--json", str(file))
    parts = json.loads(file.read_text())["parts"]
    assert done.returncode == 0 and {str(rows) for rows in parts.values()} == {
        "[{'not measured': 'the time was over'}]"
    }


@pytest.mark.slow  # a minute of models on the meta device
def test_the_tables_of_scaling(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    done = run("benchmarks/scaling.py", "--json", str(file), "--figure", str(tmp_path / "scaling.png"))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 5 * 4 + 2 * 3 and (tmp_path / "scaling.png").is_file()
    assert all(row["if overlapped"] >= row["images / s GPU"] for row in rows if "GiB" in row)
