"""Whole models: the kin against the published forms, and with `--mixer` Sparse-MLP against timm's Mixer.

    python benchmarks/models.py [--models NAME ...] [--threads 1 2] [--json out.json]

float32 on a CPU, 224 px, interleaved, medians, the same weights on both sides. "bound" is the model's multiply-adds at
the peak measured with a large square product. `--mixer` times training steps of Sparse-MLP and of its dense form beside
timm's Mixer, in time per multiply-add. `--runs` times forward and backward of finished runs, with the weights they
began with and those they ended with, on a batch of their own images. `--sizes` measures the time per pixel at several
image sizes instead, `--train` a forward and backward pass, `--profile` prints where the time of our forward goes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import interleaved
import published
import sparse_mlp  # noqa: F401
from interleaved import Row, compare, interleave, peak_gflops, print_table, ratio, settle_allocator, write_json
from sparse_mlp import weights
from sparse_mlp.jobs import Context, Run, load_weights

WANTED = {"cycle_mlp_b1": 1.8, "cycle_mlp_b2": 1.8, "as_mlp_tiny": 1.15, "hire_mlp_tiny": 1.1, "hire_mlp_small": 1.1}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    theirs = published.build(name)
    ours = timm.create_model(name)
    ours.load_state_dict(weights.convert(theirs.state_dict(), name))
    return ours, theirs


def forward(name: str, batch: int, rounds: int, gflops: float) -> Row:
    ours, theirs = pair(name)
    ours.eval(), theirs.eval()
    x = torch.randn(batch, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ours(x)
    with torch.inference_mode():
        assert (ours(x) - theirs(x)).abs().max() <= 2e-5 * theirs(x).abs().max()
        return compare(
            f"{name} forward, batch {batch}",
            {"ours": lambda: ours(x), "published": lambda: theirs(x)},
            rounds=rounds,
            at_least=WANTED.get(name),
            bound_ms=1e-6 * counter.get_total_flops() / gflops,
        )


def train(name: str, batch: int, rounds: int, gflops: float) -> Row:
    ours, theirs = pair(name)
    x = torch.randn(batch, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        ours(x).square().mean().backward()
    return compare(
        f"{name} forward + backward, batch {batch}",
        {
            name: lambda m=model: m(x).square().mean().backward()
            for name, model in (("ours", ours), ("published", theirs))
        },
        rounds=rounds,
        bound_ms=1e-6 * counter.get_total_flops() / gflops,
    )


def against_mixer(size: str, batch: int, rounds: int, gflops: float) -> list[dict[str, object]]:
    """Training steps of Sparse-MLP and of Sparse-MLP without sparse blocks, against timm's Mixer of that size."""
    models = {
        "mixer (timm)": timm.create_model(f"mixer_{size}_224"),
        "sparse_mlp, no sparse blocks": timm.create_model(f"sparse_mlp_{size}_224", sparse_blocks=0),
        "sparse_mlp": timm.create_model(f"sparse_mlp_{size}_224"),
    }
    x = torch.randn(batch, 3, 224, 224)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    macs = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(x).square().mean().backward()
        macs[name] = counter.get_total_flops() / 2
    seconds = interleave({name: lambda m=model: step(m) for name, model in models.items()}, rounds)
    base = "mixer (timm)"
    return [
        {
            "model": f"{name} {size}",
            "threads": torch.get_num_threads(),
            "step / mixer": ratio(seconds, name, base),
            "per multiply-add": ratio(seconds, name, base) * macs[base] / macs[name],
            "bound / mixer": 2e-9 * macs[name] / gflops / statistics.median(seconds[base]),
        }
        for name in models
    ]


def steps_of_runs(folders: list[Path], rounds: int) -> list[dict[str, object]]:
    """Each run's step before and after training, against the first run's before: a router that has become sure of
    itself must cost no more than a new one."""
    alternatives = {}
    for folder in folders:
        run = Run(folder)
        job = run.job(run.recipe, Context(run.folder))
        ended = copy.deepcopy(job.task)
        load_weights(ended.backbone(), folder)
        batch = next(iter(job.loaders.train(start_step=0, steps=1, rank=0, world_size=1)))
        for when, task in (("began", job.task), ("ended", ended)):
            alternatives[f"{folder.name}, as it {when}"] = partial(step_of_task, task.train(), batch)
    seconds = interleave(alternatives, rounds)
    base = next(iter(alternatives))
    threads = torch.get_num_threads()
    return [{"run": name, "threads": threads, "step / first": ratio(seconds, name, base)} for name in alternatives]


def step_of_task(task: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    task.zero_grad(set_to_none=True)
    task(batch)["loss"].backward()


@torch.inference_mode()
def time_per_pixel(name: str, sizes: list[int], rounds: int) -> dict[int, float]:
    """Nanoseconds per pixel at each size, one image, features only."""
    model = timm.create_model(name, features_only=True).eval()
    images = {size: torch.randn(1, 3, size, size) for size in sizes}
    seconds = interleave({str(s): lambda x=x: model(x) for s, x in images.items()}, rounds)
    result = {size: 1e9 * statistics.median(seconds[str(size)]) / size**2 for size in sizes}
    table = "  ".join(f"{size}: {ns:.0f} ns ({ns / result[sizes[0]]:.2f}x)" for size, ns in result.items())
    print(f"{name:<16} {torch.get_num_threads()} thr  time per pixel  {table}", flush=True)
    return result


@torch.inference_mode()
def profile(name: str, batch: int) -> None:
    model, x = timm.create_model(name).eval(), torch.randn(batch, 3, 224, 224)
    model(x)
    with torch.profiler.profile() as profiler:
        model(x)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WANTED))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--mixer", choices=["s16", "b16", "l16"], nargs="+", help="sizes of Sparse-MLP to time")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for one thread on a machine in use")
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time adds up all threads: use it with --threads 1")
    interleaved.USE_CPU_TIME = args.cpu_time
    torch.manual_seed(0)
    settle_allocator()
    rows, peaks, sizes = [], {}, {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        peaks[threads] = gflops = peak_gflops()
        if args.mixer:
            mixers = [row for size in args.mixer for row in against_mixer(size, args.batch, args.rounds, gflops)]
            print_table("Training step against timm's Mixer", mixers)
            rows += mixers
            continue
        if args.runs:
            of_runs = steps_of_runs(args.runs, args.rounds)
            print_table("Forward + backward of finished runs", of_runs)
            rows += of_runs
            continue
        for name in args.models:
            if args.profile:
                profile(name, args.batch)
            elif args.sizes:
                sizes[f"{name}, {threads} threads"] = time_per_pixel(name, args.sizes, args.rounds)
            else:
                rows.append((train if args.train else forward)(name, args.batch, args.rounds, gflops))
    write_json(args.json, rows, peak_gflops=peaks, nanoseconds_per_pixel=sizes)


if __name__ == "__main__":
    main()
