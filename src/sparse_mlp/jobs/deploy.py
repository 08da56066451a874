"""Programs of a trained model for other runtimes: ONNX, torch.export, and ONNX in 8 bits.

A program takes normalised images (batch, channels, height, width) and gives what the model gives: logits of a
classifier. Its experts are unrolled: each item is multiplied with the weights of its own experts only.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from sparse_mlp.data import InputSpec
from sparse_mlp.errors import UserError
from sparse_mlp.files import replacing
from sparse_mlp.moe.unrolled import unroll

_log = logging.getLogger(__name__)

ENDINGS = {"timm": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""What a model is exported to, and how the file's name ends."""

TOLERANCE = 1e-4  # of a program's answers, relative to the largest of the model's, or absolute below 1
_MOST_BATCH = 4096
_LEAST = 128  # pixels at which the last map has several positions: a tracer takes a side of 1 for one that stays 1
_OTHER = 32  # pixels that an image of the other size has more on one side
_BLOCK = 32  # weights that have a scale in common


@dataclass(frozen=True)
class Program:
    """A file, and a function from images (B, C, H, W) to its answers."""

    file: Path
    sizes: str
    call: Any


def check_target(target: Path, to: str) -> None:
    """UserError unless the file's ending is that of the format."""
    if to not in ENDINGS:
        raise UserError(f"--to {to!r} must be one of {', '.join(ENDINGS)}")
    if target.suffix != ENDINGS[to] or target.is_dir():
        raise UserError(f"the file to write for --to {to} must end in {ENDINGS[to]}, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")


class _Differs(RuntimeError):
    """A program's answers are not the model's."""


def export(
    model: nn.Module, name: str, spec: InputSpec, to: str, target: Path, *, fixed: bool | None = None
) -> Program:
    """Write a model's program after its answers have been compared with the model's.

    The batch is dynamic, and the size too unless the model takes only one (`fixed`; left out: as timm says of `name`)
    or the exporter cannot leave it open. UserError for a model that cannot be exported.
    """
    check_target(target, to)
    if fixed is None:
        published = get_pretrained_cfg(name)
        fixed = published is None or published.fixed_input_size
    unrolled, metadata = unroll(model), _metadata(name, spec)
    for any_size in (False,) if fixed else (True, False):
        try:
            with replacing(target) as temporary:
                sizes, call = _write(unrolled, model, spec, to, temporary, metadata, any_size)
            return Program(target, sizes, call)
        except (UserError, OSError):
            raise
        except Exception as error:  # torch.export and the exporter each have their own, of many lines
            reason = _innermost(error)
            if any_size:
                _log.info("the size stays %s: %s", spec.image_size, reason)
            elif isinstance(error, _Differs):
                raise
            else:
                raise UserError(f"model {name} cannot be exported to {to}: {reason}") from error
    raise AssertionError("the last attempt returns or raises")


def _write(
    unrolled: nn.Module,
    model: nn.Module,
    spec: InputSpec,
    to: str,
    file: Path,
    metadata: Mapping[str, str],
    any_size: bool,
) -> tuple[str, Any]:
    """Write the program and compare it; returns in words which sizes it takes, and the function."""
    size, generator = spec.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(3, spec.channels, size, size, generator=generator)
    other = torch.randn(2, spec.channels, max(size, _LEAST), max(size, _LEAST) + _OTHER, generator=generator)
    program = _traced(unrolled, other if any_size else images, any_size)
    (_write_onnx if to == "onnx" else _write_program)(program, file, metadata)
    call = load(file, to)
    for batch in (images[:1], images, images[:2]):
        _compare(call, model, batch)
    if not _takes_any_size(program):
        return f"any batch, {size}x{size} pixels", call
    _compare(call, model, other.mT)
    return "any batch, any size that the model takes", call


def _traced(model: nn.Module, images: Tensor, any_size: bool) -> torch.export.ExportedProgram:
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=_MOST_BATCH)}
    if any_size:
        dynamic |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return torch.export.export(model, (images,), dynamic_shapes=(dynamic,))


def _takes_any_size(program: torch.export.ExportedProgram) -> bool:
    """Whether height and width stayed open."""
    shape = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == "x")
    return not any(isinstance(side, int) for side in shape.meta["val"].shape[2:])


def _innermost(error: BaseException) -> str:
    """The first line of the error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _metadata(name: str, spec: InputSpec) -> dict[str, str]:
    """What a user of the file needs to know, as text."""
    values = {"model": name, "classes": list(spec.classes), "image_size": spec.image_size, "mean": list(spec.mean),
              "std": list(spec.std), "crop_pct": spec.crop_pct}  # fmt: skip
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _write_program(program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str]) -> None:
    torch.export.save(program, file, extra_files=dict(metadata))


def _write_onnx(program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str]) -> None:
    import_library("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False, external_data=False
        )
    assert made is not None
    made.model.metadata_props.update(metadata)
    made.save(str(file))


def load(file: Path, to: str) -> Any:
    """A function from images (B, C, H, W) to what the program in the file answers."""
    if to == "torch-export":
        module = torch.export.load(file).module()
        return lambda images: module(images)
    session = session_of(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def session_of(file: Path, **options: Any) -> Any:
    """An onnxruntime session on the CPU. UserError without onnxruntime."""
    onnxruntime = import_library("onnxruntime")
    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(str(file), chosen, providers=["CPUExecutionProvider"])


def import_library(name: str) -> Any:
    """UserError, which says what to install, where a library of the extra is not there."""
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"{name} is not installed: pip install 'sparse-mlp[export]'") from None


def _compare(call: Any, model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        expected, found = model(images), call(images)
    difference, largest = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if difference > TOLERANCE * largest:
        raise _Differs(f"the program differs from the model by {difference:.2g}; the largest answer is {largest:.2g}")


def export_in_8_bits(
    model: nn.Module,
    name: str,
    spec: InputSpec,
    target: Path,
    batches: Callable[[], Iterable[Mapping[str, Tensor]]],
    *,
    weight_only: bool = False,
) -> str:
    """Write a model as ONNX in 8 bits; returns how it is used, with its size and accuracy beside those in float32.

    batches: the labelled test images; where they cannot be opened, a warning says that the accuracy is not measured.
    weight_only: the activations stay in float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = export(model, name, spec, "onnx", Path(folder) / "model.onnx")
        (quantize_weights if weight_only else quantize)(whole.file, target)
        small = Program(target, whole.sizes, load(target, "onnx"))
        sizes = [program.file.stat().st_size / 1e6 for program in (whole, small)]
        lines = [f"# {sizes[0]:.2f} MB in float32, {sizes[1]:.2f} MB in 8 bits"]
        try:
            (before, images), (after, _) = (accuracy(program.call, batches()) for program in (whole, small))
        except (UserError, OSError) as error:
            _log.warning("the accuracy in 8 bits is not measured: %s", error)
        else:
            lines.append(f"# top-1 on the {images:,} test images: {before:.2%} in float32, {after:.2%} in 8 bits")
    return "\n".join([*lines, usage(small, "onnx", spec)])


def quantize(source: Path, target: Path) -> None:
    """Weights of all matrix products in 8 bits, activations as they come (onnxruntime's dynamic quantisation)."""
    import_library("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a step for static quantisation
    try:
        with replacing(target) as temporary:
            quantize_dynamic(
                source, temporary, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
            )  # fmt: skip
    finally:
        logging.root.setLevel(level)


def quantize_weights(source: Path, target: Path) -> None:
    """Weights of all matrix products in 8 bits, one scale for each 32 of a column; all else stays in float32.

    The operator is onnxruntime's own, MatMulNBits of com.microsoft.
    """
    onnx = import_library("onnx")
    import_library("onnxruntime")
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    level = logging.root.level
    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=_BLOCK, is_symmetric=True)
    logging.root.setLevel(logging.ERROR)  # it tells of every product
    try:
        quantizer.model.replace_gemm_with_matmul()  # the layers of the experts
        quantizer.process()
    finally:
        logging.root.setLevel(level)
    with replacing(target) as temporary:
        onnx.save(quantizer.model.model, temporary)


def accuracy(call: Any, batches: Iterable[Mapping[str, Tensor]]) -> tuple[float, int]:
    """Top-1 of a program on labelled images, and how many these are."""
    right = total = 0
    for batch in batches:
        right += int((call(batch["image"]).argmax(1) == batch["target"]).sum())
        total += len(batch["target"])
    return right / max(1, total), total


def usage(program: Program, to: str, spec: InputSpec) -> str:
    """The lines of code that use the file."""
    shape = f"(batch, {spec.channels}, {spec.image_size}, {spec.image_size})"
    normal = f"normalised: (pixels / 255 - {np.round(spec.mean, 4).tolist()}) / {np.round(spec.std, 4).tolist()}"
    if to == "torch-export":
        lines = ["import torch", f"model = torch.export.load({str(program.file)!r}).module()", "logits = model(images)"]
    else:
        lines = [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({str(program.file)!r})",
            'logits = session.run(None, {"images": images})[0]',
        ]
    return "\n".join([f"# images: {shape}, {normal}; {program.sizes}", *lines])
