"""What it costs to be distributed: two processes of one thread against one process of two, same global batch, on a CPU.

    python benchmarks/distributed.py
    unshare -n sh -c "ip link set lo up && python benchmarks/distributed.py --bytes"

Training steps (forward, backward, clipping, AdamW, as the engine makes them) of Sparse-B/16 with copies of all weights
(DDP), with experts split over both processes, and with everything split (FSDP2), interleaved; medians of ratios. With
--bytes: what goes over the loopback device in a step (in a network namespace nothing else does), and over what
`sparse-mlp info --gpus` says, which is the least that has to. With --saving: how long a step stops for a checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist

import sparse_mlp.models  # noqa: F401 - registers the models
from interleaved import write_json
from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.distributed.cost import measure
from sparse_mlp.distributed.mesh import MeshShape
from sparse_mlp.distributed.plan import traffic
from sparse_mlp.engine import OptimConfig, TrainConfig
from sparse_mlp.engine.learner import Learner
from sparse_mlp.engine.saving import Saver
from sparse_mlp.tasks import Classify

MESHES = {
    "one process": None,
    "DDP": MeshConfig(),
    "experts over two": MeshConfig(expert=2),
    "FSDP2": MeshConfig(shard=True),
    "experts over two, FSDP2": MeshConfig(expert=2, shard=True),
}
ALLOWED = {"DDP": 1.10, "experts over two": 1.20}


def worker(pipe: Connection, mesh: MeshConfig | None, port: int, rank: int, options: argparse.Namespace) -> None:
    """Make steps when told to; answer with their seconds, the slowest rank's, and the bytes sent meanwhile."""
    ranks = 1 if mesh is None else 2
    torch.set_num_threads(2 // ranks)
    if ranks > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()})
    with distributed.join("cpu") as device:
        torch.manual_seed(0)
        task = Classify(timm.create_model(options.model, num_classes=10))
        size = task.model.pretrained_cfg["input_size"]
        learner = Learner(task, OptimConfig(), TrainConfig(steps=1, clip_grad=1.0), device, mesh)
        own = options.batch // ranks
        batch = {"image": torch.randn(own, *size), "target": torch.randint(10, (own,))}
        step = 0
        while (command := pipe.recv()) != "end":
            if command == "save":
                pipe.send(saving(learner, options.batch))
                continue
            if ranks > 1:
                dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            learner.update(batch, step, 1000, measure=False)
            if ranks > 1:
                dist.barrier()
            pipe.send((time.perf_counter() - start, sent_bytes() - before))
            step += 1


def sent_bytes() -> int:
    """Bytes sent over the loopback device, by anybody in this network namespace."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def saving(learner: Learner, batch: int) -> dict[str, float]:
    """Seconds of a copy of the state, that a step stops for a checkpoint, and until the checkpoint is on the disk."""
    tensors, numbers = learner.state()
    start = time.perf_counter()
    copies = [tensor.detach().clone() for tensor in tensors.values()]
    copy = time.perf_counter() - start
    del copies
    folder = distributed.on_main(tempfile.mkdtemp)
    saver = Saver(Path(folder), keep=1)
    start = time.perf_counter()
    saver.start(1, tensors, learner.weights(), {"learner": numbers})
    stopped = time.perf_counter() - start
    saver.wait()
    written = time.perf_counter() - start
    distributed.on_main(lambda: shutil.rmtree(folder))
    return {"copy": copy, "stopped": stopped, "on the disk": written}


class Group:
    """The processes of one alternative."""

    def __init__(self, mesh: MeshConfig | None, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
        del store
        self.pipes, self.processes = [], []
        for rank in range(1 if mesh is None else 2):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, mesh, port, rank, options), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def do(self, command: str) -> Any:
        """The answer of rank 0, when all have answered."""
        for pipe in self.pipes:
            pipe.send(command)
        answers = [pipe.recv() for pipe in self.pipes]
        return answers[0]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send("end")
        for process in self.processes:
            process.join()


def planned_bytes(model: str, batch: int, mesh: MeshConfig) -> int:
    """What both processes send in a step, by `distributed.plan` with an even load of the experts."""
    network = timm.create_model(model, num_classes=10, device="meta")
    channels, size, _ = network.pretrained_cfg["input_size"]
    cost = measure(network, batch // 2, channels, size)
    planned = MeshShape(2 // mesh.expert, mesh.expert, mesh.shard)
    return 2 * sum(traffic(cost, planned).by_axis.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sparse_mlp_b16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES)[1:], choices=list(MESHES)[1:])
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--saving", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    groups = {name: Group(MESHES[name], options) for name in ["one process", *options.meshes]}
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    sent: dict[str, list[int]] = {name: [] for name in groups}
    for number in range(options.rounds + 2):
        for name, group in groups.items():
            took, size = group.do("step")
            if number >= 2:  # the first ones allocate
                seconds[name].append(took)
                sent[name].append(size)
    rows = {}
    for name in options.meshes:
        ratios = [a / b for a, b in zip(seconds[name], seconds["one process"], strict=True)]
        rows[name] = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        allowed = f" (allowed {ALLOWED[name]:.2f})" if name in ALLOWED else ""
        line = f"{name:<26} {rows[name]['ratio']:.2f} of one process{allowed} [{min(ratios):.2f}..{max(ratios):.2f}]"
        if options.bytes:
            rows[name]["MB"] = statistics.median(sent[name]) / 1e6
            mesh = MESHES[name]
            assert mesh is not None
            rows[name]["of the plan"] = statistics.median(sent[name]) / planned_bytes(
                options.model, options.batch, mesh
            )
            line += f"   {rows[name]['MB']:.1f} MB a step, {rows[name]['of the plan']:.3f} of the plan"
        if options.saving:
            rows[name] |= groups[name].do("save")
            line += "   checkpoint: " + ", ".join(
                f"{key} {rows[name][key]:.2f} s" for key in ("copy", "stopped", "on the disk")
            )
        print(line)
    for group in groups.values():
        group.end()
    write_json(
        options.json, [{"mesh": name, **row} for name, row in rows.items()], model=options.model, batch=options.batch
    )


if __name__ == "__main__":
    main()
