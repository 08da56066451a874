"""One MoE layer against a dense two-layer MLP of the same width and hidden size on the same items.

    python benchmarks/moe_layer.py [--rounds 7] [--processes 3] [--threads 1 2] [--peers] [--memory] [--json FILE]

Forward + backward, float32, no dropped items, every run in turn within a round; medians of ratios to the dense layer.
The tables are made in several fresh processes, whose medians they give, and our range: where the heap of a process
happens to end decides which alternative takes new pages from the system at every step, for the whole life of the
process, and that is worth a tenth and more. Beside them two bounds, K times the dense layer's matrix products alone and
the products of the experts alone, which have fewer rows each and eight times the weights; and with --peers the layers
that pip installs here (`pip install -e '.[bench]'`), set to drop nothing. Then the layer on other
backends, more experts at equal multiply-adds and one single image, both with the bound that memory sets, narrow layers,
and peak memory.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from interleaved import interleave, print_table, ratio, settle_allocator, write_json
from peers import PEERS
from sparse_mlp.moe import MoeMlp, kernels
from sparse_mlp.moe.kernels import library

SHAPES = {
    "3,136 x 512 -> 2,048": (3136, 512, 2048),
    "6,272 x 768 -> 3,072": (6272, 768, 3072),
    "8,192 x 196 -> 784": (8192, 196, 784),
}
FIRST, *_, LAST = SHAPES
Row = dict[str, Any]


def dense_mlp(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def train_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward + backward into fresh gradients, the input's too."""
    grad = torch.randn_like(x)

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(grad)

    return run


def products(items: int, dim: int, hidden: int, num_experts: int = 1) -> Callable[[], None]:
    """The six matrix products of a forward + backward and no more: of a dense layer, or of experts evenly loaded."""
    x, h = torch.randn(items, dim).chunk(num_experts), torch.randn(items, hidden).chunk(num_experts)
    w1, w2 = torch.randn(num_experts, hidden, dim), torch.randn(num_experts, dim, hidden)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)

    def run() -> None:
        for x_e, h_e, w1_e, w2_e in zip(x, h, w1, w2, strict=True):
            x_e @ w1_e.t(), h_e @ w2_e.t()
        for x_e, h_e, w1_e, w2_e, dw1_e, dw2_e in zip(x, h, w1, w2, dw1, dw2, strict=True):
            x_e @ w2_e, h_e @ w1_e
            torch.mm(h_e.t(), x_e, out=dw1_e), torch.mm(x_e.t(), h_e, out=dw2_e)

    return run


def against_dense(threads: int, rounds: int, with_peers: bool) -> list[Row]:
    rows = []
    for shape, (items, dim, hidden) in SHAPES.items():
        x = torch.randn(items, dim, requires_grad=True)
        for top_k in (1, 2):
            runs = {"dense": train_step(dense_mlp(dim, hidden), x)}
            runs["products"] = products(items, dim, hidden)
            runs["expert products"] = products(top_k * items, dim, hidden, 8)
            runs["sparse_mlp"] = train_step(MoeMlp(dim, hidden, 8, top_k), x)
            if with_peers:
                runs |= {name: train_step(make(dim, hidden, 8, top_k), x) for name, make in PEERS.items()}
            seconds = interleave(runs, rounds)
            row: Row = {"shape": shape, "K": top_k, "threads": threads}
            layers = (name for name in runs if name not in ("dense", "products", "expert products"))
            row |= {name: ratio(seconds, name, "dense") for name in layers}
            row["bound"] = top_k * ratio(seconds, "products", "dense")
            row["expert products"] = ratio(seconds, "expert products", "dense")
            rows.append(row)
    return rows


def over_processes(make_rows: Callable[..., list[Row]], processes: int, threads: int, *args: Any) -> list[Row]:
    """`make_rows(threads, ...)` in fresh processes, one after another: the medians of its numbers, and the range of
    those that `sparse_mlp` has."""
    with multiprocessing.get_context("spawn").Pool(1, _new_process, (threads,), maxtasksperchild=1) as pool:
        measured = [pool.apply(make_rows, (threads, *args)) for _ in range(processes)]
    rows = []
    for same in zip(*measured, strict=True):
        ratios = [name for name, value in same[0].items() if isinstance(value, float)]
        row = same[0] | {name: statistics.median(other[name] for other in same) for name in ratios}
        if "sparse_mlp" in row:
            ours = [other["sparse_mlp"] for other in same]
            row["range of sparse_mlp"] = f"{min(ours):.2f} to {max(ours):.2f}"
        rows.append(row)
    return rows


def _new_process(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settle_allocator()


def backends(threads: int, rounds: int) -> list[Row]:
    """The layer with its C kernels, on torch's grouped products, which take their place elsewhere, and in its plain
    form; first and last shape."""
    rows = []
    for shape in (FIRST, LAST):
        items, dim, hidden = SHAPES[shape]
        x = torch.randn(items, dim, requires_grad=True)
        step = train_step(MoeMlp(dim, hidden, 8, 1), x)

        def grouped(step: Callable[[], None] = step) -> None:
            with mock.patch.object(library, "load", lambda: "none, for a comparison"):
                step()

        def plain(step: Callable[[], None] = step) -> None:
            with mock.patch.dict(os.environ, {kernels.VARIABLE: "plain"}):
                step()

        runs = {"dense": train_step(dense_mlp(dim, hidden), x), "C": step, "grouped": grouped, "plain": plain}
        seconds = interleave(runs, rounds)
        row: Row = {"shape": shape, "threads": threads, "kernels": kernels.state()}
        rows.append(row | {name: ratio(seconds, name, "dense") for name in list(runs)[1:]})
    return rows


def more_experts(threads: int, rounds: int) -> list[Row]:
    """E from 8 to 64 at equal multiply-adds, first shape, K=1.

    The memory bound: forward reads every expert's weights, backward reads them again and writes their gradients. What
    that is beyond E=8 is timed as two sums and one fill of as many bytes, in memory already at hand.
    """
    items, dim, hidden = SHAPES[FIRST]
    x = torch.randn(items, dim, requires_grad=True)
    counts = (8, 16, 32, 64)
    runs = {"dense": train_step(dense_mlp(dim, hidden), x)}
    runs |= {f"E={e}": train_step(MoeMlp(dim, hidden, e, 1), x) for e in counts}
    weights = torch.zeros(2 * counts[-1] * dim * hidden)
    for e in counts:
        extra = weights[: 2 * (e - 8) * dim * hidden]
        runs[f"memory {e}"] = lambda extra=extra: (extra.sum(), extra.sum(), extra.zero_())
    seconds = interleave(runs, rounds)
    return [
        {
            "E": e,
            "threads": threads,
            "to dense": ratio(seconds, f"E={e}", "dense"),
            "to E=8": ratio(seconds, f"E={e}", "E=8"),
            "memory bound to E=8": 1 + ratio(seconds, f"memory {e}", "E=8"),
        }
        for e in counts
    ]


def narrow(threads: int, rounds: int) -> list[Row]:
    """Layers of small models, where the router and the sorting weigh as much as the experts; E=8, K=1.

    "sure": with a router whose logits have a standard deviation of 2, as those of the CIFAR-10 recipe after training;
    at the start it is 0.2.
    """
    rows = []
    for items, dim, hidden in ((8192, 64, 64), (8192, 64, 32), (8192, 128, 128)):
        x = torch.randn(items, dim, requires_grad=True)
        layers = {"dense": dense_mlp(dim, hidden), "sparse_mlp": MoeMlp(dim, hidden, 8), "sure": MoeMlp(dim, hidden, 8)}
        nn.init.normal_(layers["sure"].router.weight, std=2 / dim**0.5)
        seconds = interleave({name: train_step(layer, x) for name, layer in layers.items()}, 3 * rounds)
        row: Row = {"shape": f"{items:,} x {dim} -> {hidden}", "threads": threads}
        rows.append(row | {name: ratio(seconds, name, "dense") for name in ("sparse_mlp", "sure")})
    return rows


def one_image(threads: int, rounds: int) -> list[Row]:
    """Forward of the items of one image (a sixteenth of the first shape, 196), without gradients; E=8, K=1.

    "reading": of the eight experts' weights alone, as a sum; the layer has the dense one's multiply-adds to do besides.
    """
    rows = []
    for dim, hidden in ((512, 2048), (768, 3072)):
        x, weights = torch.randn(196, dim), torch.ones(8 * 2 * dim * hidden)
        dense, moe = dense_mlp(dim, hidden).eval(), MoeMlp(dim, hidden, 8, 1).eval()
        runs = {
            "dense": lambda dense=dense, x=x: dense(x),
            "sparse_mlp": lambda moe=moe, x=x: moe(x),
            "reading": weights.sum,
        }
        with torch.no_grad():
            seconds = interleave(runs, 20 * rounds)
        row: Row = {"shape": f"196 x {dim} -> {hidden}", "threads": threads}
        rows.append(row | {name: ratio(seconds, name, "dense") for name in ("sparse_mlp", "reading")})
    return rows


def memory() -> list[Row]:
    """Peak resident memory, in MB, that one forward + backward adds, K=1, E=8: the median of three fresh processes.

    Both counts hold the input's and the weights' gradients; an MoE layer has E times the weights. Of a process's first
    step, in which libraries build their tables too, and of one after others, as nearly all steps of a training are.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "sparse_mlp.moe"])  # imported once: that takes longer than the steps
    layers = ("dense", "sparse_mlp")
    rows = []
    for shape, sizes in SHAPES.items():
        jobs = [(name, *sizes) for name in layers for _ in range(3)]
        with processes.Pool(1, maxtasksperchild=1) as pool:
            peaks = dict(
                zip(layers, torch.tensor(pool.starmap(_peaks_megabytes, jobs, chunksize=1)).view(2, 3, 2), strict=True)
            )
        medians = {name: of_runs.median(0).values.tolist() for name, of_runs in peaks.items()}
        row: Row = {"shape": shape}
        for i, when in enumerate(("first step", "later step")):
            row |= {f"{when}, {name} MB": medians[name][i] for name in layers}
            row[f"{when}, ratio"] = medians["sparse_mlp"][i] / medians["dense"][i]
        rows.append(row)
    return rows


def _peaks_megabytes(name: str, items: int, dim: int, hidden: int) -> tuple[float, float]:
    """What the first step of this process adds, and the fourth."""
    torch.set_num_threads(1)
    layer = dense_mlp(dim, hidden) if name == "dense" else MoeMlp(dim, hidden, 8, 1)
    x = torch.randn(items, dim, requires_grad=True)
    train_step(layer, x[:8].detach().requires_grad_())()  # libraries
    run = train_step(layer, x)

    def measure() -> float:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024

    first = measure()
    run(), run()
    return first, measure()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; medians are over these")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes; medians are over these too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory", action="store_true", help="the table of peak memory only")
    parser.add_argument("--peers", action="store_true", help=f"also time {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="write the rows and the hardware here")
    args = parser.parse_args()
    everything: list[Row] = []

    def show(title: str, rows: list[Row]) -> None:
        print_table(title, rows)
        everything.extend({"table": title} | row for row in copy.deepcopy(rows))

    for threads in [] if args.memory else args.threads:
        title = "Forward + backward, ratio to the dense layer (E=8, no drops; bound: K dense products alone)"
        times = args.processes, threads, args.rounds
        show(title, over_processes(against_dense, *times, args.peers))
        show("By backend, ratio to the dense layer (E=8, K=1)", over_processes(backends, *times))
        show("More experts at equal multiply-adds (first shape, K=1)", over_processes(more_experts, *times))
        show("Narrow layers, forward + backward, ratio to the dense layer (E=8, K=1)", over_processes(narrow, *times))
        show("One image, forward, ratio to the dense layer (E=8, K=1)", over_processes(one_image, *times))
    show("Peak memory of forward + backward, ratio to the dense layer (E=8, K=1)", memory())
    write_json(args.json, everything)


if __name__ == "__main__":
    main()
