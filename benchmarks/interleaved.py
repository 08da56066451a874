"""Fair timing of alternatives in one process: interleaved A B A B, medians, ratios; a table and JSON."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

PEAK_SIZE = 1024
USE_CPU_TIME = False  # set by --cpu-time: for one thread on a machine that others use too


@dataclass
class Row:
    """One comparison: medians in milliseconds, the published form's time over ours, and the product bound."""

    what: str
    threads: int
    milliseconds: dict[str, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    at_least: float | None = None
    bound_ms: float | None = None
    notes: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        times = "  ".join(f"{name} {ms:.2f}" for name, ms in self.milliseconds.items())
        wanted = "" if self.at_least is None else f" (wanted {self.at_least:g})"
        bound = "" if self.bound_ms is None else f"  bound {self.bound_ms:.2f}"
        notes = "".join(f"  {name} {value:.2f}x" for name, value in self.notes.items())
        spread = f"[{self.ratio_low:.2f}..{self.ratio_high:.2f}]"
        return f"{self.what:<46} {self.threads} thr  {self.ratio:6.2f}x{wanted} {spread}  ms: {times}{bound}{notes}"


def settle_allocator() -> None:
    """Free a large block once, so that glibc keeps freed memory for reuse, as in any process that has run a model.

    Otherwise whichever alternative allocates first after the memory went back to the system pays for fresh pages, which
    cost several times as much as the operators measured here.
    """
    torch.zeros(31 * 2**18)  # just under 32 MB, the largest block that glibc learns to keep


def interleave(alternatives: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run all alternatives in turn `rounds` times; return the seconds of every run."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(warmup):
        for call in alternatives.values():
            call()
    clock = time.process_time if USE_CPU_TIME else time.perf_counter
    gc.disable()
    for _ in range(rounds):
        for name, call in alternatives.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    gc.enable()
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    """Markdown, figures to three digits."""
    columns = list(rows[0])
    print(f"{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def compare(
    what: str,
    alternatives: dict[str, Callable[[], object]],
    *,
    rounds: int = 15,
    at_least: float | None = None,
    bound_ms: float | None = None,
    against: dict[str, str] | None = None,
) -> Row:
    """Compare "ours" with "published"; `against` names further ratios, ours over the alternative they point to.

    The ratio is that of the medians; the range is that of the quartiles of the ratios round by round.
    """
    seconds = interleave(alternatives, rounds)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    by_round = [b / a for a, b in zip(seconds["ours"], seconds["published"], strict=True)]
    low, _, high = statistics.quantiles(by_round, n=4)
    notes = {label: medians["ours"] / medians[name] for label, name in (against or {}).items()}
    ratio = medians["published"] / medians["ours"]
    row = Row(what, torch.get_num_threads(), medians, ratio, low, high, at_least, bound_ms, notes)
    print(row.line(), flush=True)
    return row


def peak_gflops(rounds: int = 7) -> float:
    """Billions of floating-point operations a second in a large square product, the fastest torch has here."""
    from sparse_mlp.mixing.linear import linear

    a, b = torch.randn(PEAK_SIZE, PEAK_SIZE), torch.randn(PEAK_SIZE, PEAK_SIZE)
    with torch.inference_mode():
        seconds = interleave({"linear": lambda: linear(a, b), "matmul": lambda: a @ b}, rounds)
    return 2e-9 * PEAK_SIZE**3 / min(statistics.median(values) for values in seconds.values())


def write_json(path: Path | None, rows: Sequence[Row | dict[str, object]], **extra: object) -> None:
    """Write the rows with what they were measured on, if a path was asked for."""
    if path is None:
        return
    machine = {
        "processor": _processor(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    plain = [asdict(row) if isinstance(row, Row) else row for row in rows]
    path.write_text(json.dumps({"machine": machine, **extra, "rows": plain}, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
