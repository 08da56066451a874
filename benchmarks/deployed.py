"""One image through exported programs: a model with experts against a dense one, per multiply-add.

    python benchmarks/deployed.py [--json FILE]

Each pair runs in torch (eager), as a torch.export program, in onnxruntime, and there in 8 bits, on one thread, all
interleaved in one process and timed by CPU time. Printed is the time of the model with experts over the dense one's,
each divided by its multiply-adds; the goal is 1.5.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import interleaved
import sparse_mlp
from interleaved import interleave, print_table, write_json
from sparse_mlp.data import InputSpec
from sparse_mlp.jobs import deploy
from sparse_mlp.report.cost import count_macs

_CIFAR = {name: sparse_mlp.recipe(f"cifar10_{name}").model for name in ("sparse", "mixer")}
PAIRS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], int]] = {
    "cifar10_sparse, cifar10_mixer": (
        (_CIFAR["sparse"].name, _CIFAR["sparse"].args),
        (_CIFAR["mixer"].name, _CIFAR["mixer"].args),
        32,
    ),
    "sparse_mlp_s16_224, mixer_s16_224": (("sparse_mlp_s16_224", {}), ("mixer_s16_224", {}), 224),
}
FORMS = ("torch", "torch.export", "onnxruntime", "onnxruntime, 8 bits")


def forms(name: str, arguments: dict[str, Any], size: int, folder: Path) -> tuple[dict[str, Callable[[], Any]], int]:
    """The model in each form, applied to one image; and its multiply-adds."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).eval()
    spec = InputSpec(tuple("0123456789"), 3, size, (0.5,) * 3, (0.5,) * 3, 1.0)
    image = torch.randn(1, 3, size, size)
    whole, small = folder / f"{name}.onnx", folder / f"{name}_small.onnx"
    program = deploy.export(model, name, spec, "torch-export", folder / f"{name}.pt2")
    deploy.export(model, name, spec, "onnx", whole)
    deploy.quantize(whole, small)
    sessions = [deploy.session_of(file, intra_op_num_threads=1) for file in (whole, small)]
    calls = [
        lambda: model(image),
        lambda: program.call(image),
        *(lambda session=session: session.run(None, {"images": image.numpy()}) for session in sessions),
    ]
    return dict(zip(FORMS, calls, strict=True)), count_macs(model, 3, size)[""]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    interleaved.USE_CPU_TIME = True
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pair, (sparse, dense, size) in PAIRS.items():
            with torch.inference_mode(False), torch.no_grad():
                found = [forms(*one, size, Path(folder)) for one in (sparse, dense)]
            (experts, many), (plain, few) = found
            for form in FORMS:
                seconds = interleave({"experts": experts[form], "dense": plain[form]}, given.rounds, warmup=5)
                ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
                ratio = interleaved.ratio(seconds, "experts", "dense") * few / many
                rows.append({"models": pair, "form": form, "ms": ms["experts"], "dense ms": ms["dense"],
                             "M mult-adds": many / 1e6, "dense M": few / 1e6, "ratio per mult-add": ratio})  # fmt: skip
    print_table("One image, one thread, CPU time", rows)
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
