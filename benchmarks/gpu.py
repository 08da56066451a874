"""Every check and measurement that needs a GPU, in one program of at most eight minutes.

    python benchmarks/gpu.py [--minutes 8] [--json gpu.json]
    python benchmarks/gpu.py --device cpu --quick        # the same code at toy sizes, to see that it runs

In order: the tests marked `cuda`; the peak of a large matrix product; one MoE layer, dropless and with a capacity,
against a dense MLP of equal multiply-adds, with packages that are installed beside it; the same compiled; what float32
should run on; a training step of Sparse-B/16 against Mixer-B/16, per multiply-add; single images and small batches,
eager, compiled and as a CUDA graph. bfloat16, forward + backward unless said otherwise, every alternative in turn
within a round, medians of ratios. Each table is printed and the file written anew as soon as a part is done; a part
that fails or finds its time over says so in its place, and the others run. The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moe_layer
import sparse_mlp  # noqa: F401
from interleaved import interleave, print_table, ratio, write_json
from moe_layer import train_step
from peers import PEERS
from sparse_mlp.moe import MoeMlp, kernels
from sparse_mlp.moe.kernels import cpu, grouped

ROOT = Path(__file__).parents[1]
TESTS_SECONDS = 150
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Items, their width, hidden width of an expert, experts, choices an item."""

    items: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.items:,} x {self.dim} -> {self.hidden:,}"


@dataclass
class Bench:
    """Sizes, and what was found so far. `repeats` calls between two waits for the device."""

    device: str
    deadline: float
    rounds: int = 7
    repeats: int = 5
    peak_size: int = 8192
    layers: tuple[Shape, ...] = (
        *(Shape(25088, 768, 3072, e, k) for k in (1, 2) for e in (8, 16, 32, 64)),
        Shape(49152, 392, 768, 8, 1),  # of Sparse-B/16, batch 128: token mixing, channel mixing
        Shape(50176, 384, 1536, 4, 2),
    )
    models: tuple[str, str] = ("mixer_b16_224", "sparse_mlp_b16_224")
    images: int = 128
    small: tuple[int, ...] = (1, 8)
    compiled: dict[str, Any] = field(default_factory=lambda: {"mode": "reduce-overhead"})
    tflops: float | None = None

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def times(self, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of a call of each, in every round."""

        def repeated(run: Callable[[], object]) -> Callable[[], None]:
            def call() -> None:
                for _ in range(self.repeats):
                    run()
                self.wait()

            return call

        found = interleave({name: repeated(run) for name, run in runs.items()}, self.rounds)
        return {name: [value / self.repeats for value in values] for name, values in found.items()}

    def gigabytes(self, run: Callable[[], object], module: nn.Module) -> float | None:
        """Most memory during a call, its module's weights included and other modules not; None where nobody counts."""
        if self.device != "cuda":
            return None
        module.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        weights = sum(parameter.nbytes for parameter in module.parameters())
        return (torch.cuda.max_memory_allocated() - before + weights) / 1e9

    def share_of_peak(self, flops: float, seconds: float) -> float | None:
        return None if self.tflops is None else flops / seconds / 1e12 / self.tflops


def quick(device: str, deadline: float) -> Bench:
    shapes = (*(Shape(256, 48, 64, e, k) for k in (1, 2) for e in (8, 16)), Shape(128, 49, 64, 4, 1))
    names, compiled = ("mixer_t4_32", "sparse_mlp_t4_32"), {"backend": "aot_eager"}
    return Bench(device, deadline, 3, 1, 256, shapes, names, 4, (1,), compiled)


# Parts


def tests(bench: Bench) -> list[Row]:
    """Those marked `cuda`, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "tests/moe"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_SECONDS)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        print(done.stdout[-6000:], flush=True)
        raise RuntimeError("; ".join(lines[-20:]))
    return [{"tests": lines[-1]}]


def peak(bench: Bench) -> list[Row]:
    """TFLOP/s of a large square product: what shares of the peak below are of."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(bench.peak_size, bench.peak_size, device=bench.device, dtype=dtype) for _ in range(2))
        seconds = bench.times({"product": lambda a=a, b=b: a @ b})
        bench.tflops = 2e-12 * bench.peak_size**3 / median(seconds["product"])
        rows.append({"type": str(dtype).removeprefix("torch."), "side": bench.peak_size, "TFLOP/s": bench.tflops})
    return rows


def dense_mlp(shape: Shape) -> nn.Module:
    """Of as many multiply-adds: K times the hidden width."""
    return moe_layer.dense_mlp(shape.dim, shape.hidden * shape.top_k)


def moe(shape: Shape, **kwargs: Any) -> nn.Module:
    return MoeMlp(shape.dim, shape.hidden, shape.experts, shape.top_k, **kwargs)


def layers(bench: Bench) -> list[Row]:
    """Dense time over the layer's: the share of the dense layer's FLOP/s that it has. Peers drop nothing either."""
    rows = []
    for shape in bench.layers:
        build: dict[str, Callable[[], nn.Module]] = {
            "dense": lambda shape=shape: dense_mlp(shape),
            "dropless": lambda shape=shape: moe(shape),
            "capacity": lambda shape=shape: moe(shape, capacity_ratio=1.0, capacity_group="batch"),
        }
        for name, make in PEERS.items():
            sizes = (shape.dim, shape.hidden, shape.experts, shape.top_k)
            build[name] = lambda make=make, sizes=sizes: make(*sizes)
        rows.append(_layer_row(bench, shape, build, torch.bfloat16))
    return rows


def _layer_row(bench: Bench, shape: Shape, build: dict[str, Callable[[], nn.Module]], dtype: torch.dtype) -> Row:
    x = torch.randn(shape.items, shape.dim, device=bench.device, dtype=dtype, requires_grad=True)
    made, runs, absent = dict[str, nn.Module](), dict[str, Callable[[], None]](), dict[str, str]()
    for name, make in build.items():
        try:
            with torch.device(bench.device):
                made[name] = make().to(bench.device, dtype).train()
            run = train_step(made[name], x)
            run()
            runs[name] = run
        except Exception as error:  # a peer that is not installed, or does not run here
            if name not in PEERS:
                raise
            absent[name] = "not installed" if isinstance(error, ImportError) else f"fails: {type(error).__name__}"
    seconds = bench.times(runs)
    flops = 3 * 2 * 2 * shape.items * shape.top_k * shape.dim * shape.hidden
    row: Row = {"shape": str(shape), "E": shape.experts, "K": shape.top_k}
    row["dense ms"] = 1e3 * median(seconds["dense"])
    row["dense of peak"] = bench.share_of_peak(flops, median(seconds["dense"]))
    row |= {name: 1 / ratio(seconds, name, "dense") for name in runs if name != "dense"} | absent
    return row | {f"GB {name}": bench.gigabytes(run, made[name]) for name, run in runs.items()}


def compiled_layers(bench: Bench) -> list[Row]:
    """torch.compile, of which the dense layer gains too; the first shape with fewest and with most experts."""
    first = bench.layers[0]
    most = max(shape.experts for shape in bench.layers)
    rows = []
    for experts in (first.experts, most):
        shape = Shape(first.items, first.dim, first.hidden, experts, first.top_k)
        options = {key: value for key, value in bench.compiled.items() if key == "backend"}

        def build(make: Callable[[], nn.Module], options: dict[str, Any] = options) -> nn.Module:
            return torch.compile(make().to(bench.device, torch.bfloat16), fullgraph=True, **options)

        torch._dynamo.reset()
        made = {
            "dense": lambda shape=shape: build(lambda: dense_mlp(shape)),
            "dropless": lambda shape=shape: build(lambda: moe(shape)),
            "capacity": lambda shape=shape: build(lambda: moe(shape, capacity_ratio=1.0, capacity_group="batch")),
        }
        rows.append(_layer_row(bench, shape, made, torch.bfloat16))
    return rows


def float32(bench: Bench) -> list[Row]:
    """Of a GPU that has no grouped product of a type the layer runs its definition, which copies weights; torch's own
    fallback waits for the counts and loops. Both in float32, over the dense layer's time: which should it be?"""
    rows = []
    for shape in (bench.layers[0], bench.layers[-1]):
        layer, dense = moe(shape).to(bench.device), dense_mlp(shape).to(bench.device)
        x = torch.randn(shape.items, shape.dim, device=bench.device, requires_grad=True)
        as_it_is = train_step(layer, x)
        runs = {"dense": train_step(dense, x), "definition": _definition(as_it_is), "fallback": _fallback(as_it_is)}
        runs["as it is"] = as_it_is
        seconds = bench.times(runs)
        row: Row = {"shape": str(shape), "E": shape.experts, "K": shape.top_k}
        row |= {name: ratio(seconds, name, "dense") for name in list(runs)[1:]}
        made = {name: dense if name == "dense" else layer for name in runs}
        rows.append(row | {f"GB {name}": bench.gigabytes(run, made[name]) for name, run in runs.items()})
    return rows


def _definition(run: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with mock.patch.dict(os.environ, {kernels.VARIABLE: "plain"}):
            run()

    return call


def _fallback(run: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        served = mock.patch.object(grouped, "serves", lambda args: isinstance(args[1], Tensor))
        with served, mock.patch.object(cpu, "serves", lambda args: False):
            run()

    return call


def models(bench: Bench) -> list[Row]:
    """A training step under autocast, over the dense model's, as it is and per multiply-add."""
    side = timm.get_pretrained_cfg(bench.models[0]).input_size[-1]
    x = torch.randn(bench.images, 3, side, side, device=bench.device)
    made, runs, flops = dict[str, nn.Module](), dict[str, Callable[[], None]](), dict[str, int]()
    for name in bench.models:
        model = made[name] = timm.create_model(name).to(bench.device).train()

        def run(model: nn.Module = model) -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(bench.device, torch.bfloat16):
                y = model(x)
            y.float().square().mean().backward()

        with FlopCounterMode(display=False) as counter:
            run()
        runs[name], flops[name] = run, counter.get_total_flops()
    seconds, base = bench.times(runs), bench.models[0]
    return [
        {
            "model": name,
            "images": bench.images,
            "ms": 1e3 * median(seconds[name]),
            "over dense": ratio(seconds, name, base),
            "per multiply-add": ratio(seconds, name, base) * flops[base] / flops[name],
            "of peak": bench.share_of_peak(flops[name], median(seconds[name])),
            "GB": bench.gigabytes(runs[name], made[name]),
        }
        for name in bench.models
    ]


@torch.no_grad()
def small_batches(bench: Bench) -> list[Row]:
    """Milliseconds of a forward in bfloat16: eager, torch.compile without launches of its own, a CUDA graph."""
    side = timm.get_pretrained_cfg(bench.models[0]).input_size[-1]
    rows = []
    for name in bench.models:
        model = timm.create_model(name).to(bench.device, torch.bfloat16).eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, **bench.compiled)
        for images in bench.small:
            x = torch.randn(images, 3, side, side, device=bench.device, dtype=torch.bfloat16)
            runs: dict[str, Callable[[], object]] = {"eager": lambda m=model, x=x: m(x)}
            runs["compiled"] = lambda m=compiled, x=x: m(x)
            if bench.device == "cuda":
                runs["graph"] = _graph(model, x).replay
            expected = model(x).float()
            assert (compiled(x).float() - expected).abs().max() <= 0.1 * expected.abs().max().clamp_min(1)
            seconds = bench.times(runs)
            row: Row = {"model": name, "images": images}
            rows.append(row | {f"{kind} ms": 1e3 * median(values) for kind, values in seconds.items()})
    return rows


def _graph(model: nn.Module, x: Tensor) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph


# All of them


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "Tests on the GPU": tests,
    "Peak": peak,
    "Layer: share of the dense layer's FLOP/s": layers,
    "Layer, compiled: share of the compiled dense layer's FLOP/s": compiled_layers,
    "Training step of a model": models,
    "Small batches": small_batches,
    "Layer in float32: time over the dense layer's": float32,
}


@contextmanager
def _until(deadline: float) -> Iterator[None]:
    """TimeoutError when the time is over."""

    def stop(*_: Any) -> None:
        raise TimeoutError("the time was over")

    left = deadline - time.monotonic()
    if left <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_all(bench: Bench, path: Path | None) -> bool:
    """Whether no part failed; one that the time was over for has not."""
    results, well = dict[str, Any](), True
    hardware = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU: toy sizes, no measurement of anything"
    for title, part in PARTS.items():
        began = time.monotonic()
        try:
            with _until(bench.deadline):
                rows = part(bench)
        except Exception as error:  # the other parts still run
            late = isinstance(error, TimeoutError)
            well = well and late
            message = re.sub(r"\s+", " ", str(error))[:600]
            rows = [{"not measured": message} if late else {"failed": f"{type(error).__name__}: {message}"}]
        if bench.device == "cuda":
            torch.cuda.empty_cache()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        shown = [column for column in columns if any(row.get(column) is not None for row in rows)]
        print_table(
            f"## {title} ({time.monotonic() - began:.0f} s)", [{c: row.get(c, "") for c in shown} for row in rows]
        )
        results[title] = [{key: value for key, value in row.items() if value is not None} for row in rows]
        write_json(path, [], device=hardware, parts=results)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not measured by then is left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --quick runs the same code at toy sizes")
    if args.device == "cpu" and not args.quick:
        parser.error("the sizes are a GPU's: --device cpu needs --quick")
    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * args.minutes
    bench = quick(args.device, deadline) if args.quick else Bench(args.device, deadline)
    sys.exit(0 if run_all(bench, args.json) else 1)


if __name__ == "__main__":
    main()
