"""Files of weights of every format and wrapping into models of every family, and what is refused in one line."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_mlp import weights
from sparse_mlp.errors import UserError
from sparse_mlp.weights import CheckpointMismatch, convert, convert_file

SMALL = {
    "cycle_mlp_b1": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "hire_mlp_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "as_mlp_tiny": {"depths": (1, 1, 1, 1), "embed_dim": 8},
    "mixer_t4_32": {"num_blocks": 1},
    "sparse_mlp_t4_32": {"num_blocks": 1, "sparse_blocks": 1},
    "resnet10t": {},
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 32, "num_heads": 2},
}


def build(name: str, classes: int = 7) -> nn.Module:
    """A small model whose every tensor says something: some start as constants."""
    model = timm.create_model(name, num_classes=classes, **SMALL[name])
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def assert_same(model: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> None:
    for name, value in other.state_dict().items():
        if not name.startswith(but or ("no such name",)):
            assert torch.equal(model.state_dict()[name], value), name


PREFIXES = ["backbone.", "encoder.", "module.", "model.", "_orig_mod.module.", "module.backbone.", "model.encoder."]


@pytest.mark.parametrize("name", SMALL)
def test_every_prefix_is_read_for_every_family(name: str, tmp_path: Path) -> None:
    source, path = build(name), tmp_path / "weights.pth"
    for prefix in PREFIXES:
        parts = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
        if "backbone" in prefix or "encoder" in prefix:
            outer = prefix.removesuffix("backbone.").removesuffix("encoder.")
            parts[f"{outer}decode_head.weight"] = torch.ones(3)
        torch.save({"state_dict": parts}, path)
        target = build(name)
        weights.load(target, path)
        assert_same(target, source)


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 3), "decoder": nn.Linear(3, 2)})
    save_file({f"module.{name}": value + 1 for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights.load(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[name] + 1) for name, value in model.state_dict().items())


def google_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """A Mixer's weights under the names of Google's files, kernels in x out."""
    parts = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "norm": "pre_head_layer_norm"}
    parts |= {"mlp_tokens": "token_mixing", "mlp_channels": "channel_mixing", "fc1": "Dense_0", "fc2": "Dense_1"}
    arrays = {}
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        key = re.sub(r"^blocks\.(\d+)", r"MixerBlock_\1", key.replace("stem.proj", "stem"))
        key = "/".join(parts.get(part, part) for part in key.split("."))
        key = re.sub("weight$", "scale" if "ayer" in key.rsplit("/", 2)[-2].lower() else "kernel", key)
        if key.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        arrays[key] = array
    return arrays


def vit_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """A vision transformer's weights under the names of Google's files."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    width, heads = state["norm.weight"].size, model.blocks[0].attn.num_heads
    block = "Transformer/encoderblock_0/"
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        f"{block}MultiHeadDotProductAttention_1/out/kernel": state["blocks.0.attn.proj.weight"].T.reshape(
            heads, -1, width
        ),
        f"{block}MultiHeadDotProductAttention_1/out/bias": state["blocks.0.attn.proj.bias"],
    }
    for theirs, ours in {
        "Transformer/encoder_norm": "norm",
        f"{block}LayerNorm_0": "blocks.0.norm1",
        f"{block}LayerNorm_2": "blocks.0.norm2",
    }.items():
        arrays |= {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}
    for i in range(2):
        arrays[f"{block}MlpBlock_3/Dense_{i}/kernel"] = state[f"blocks.0.mlp.fc{i + 1}.weight"].T
        arrays[f"{block}MlpBlock_3/Dense_{i}/bias"] = state[f"blocks.0.mlp.fc{i + 1}.bias"]
    for i, part in enumerate(("query", "key", "value")):
        rows = slice(i * width, (i + 1) * width)
        kernel = state["blocks.0.attn.qkv.weight"][rows].T.reshape(width, heads, -1)
        arrays[f"{block}MultiHeadDotProductAttention_1/{part}/kernel"] = kernel
        arrays[f"{block}MultiHeadDotProductAttention_1/{part}/bias"] = state["blocks.0.attn.qkv.bias"][rows].reshape(
            heads, -1
        )
    return arrays


def _write_npz(model: nn.Module, path: Path) -> Path:
    path = path.with_suffix(".npz")
    np.savez(path, **(vit_arrays(model) if hasattr(model, "cls_token") else google_arrays(model)))
    return path


def _write_pth(model: nn.Module, path: Path) -> Path:
    torch.save({"model": model.state_dict()}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def _write_safetensors(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("write", [_write_npz, _write_pth, _write_safetensors])
@pytest.mark.parametrize("name", ["mixer_t4_32", "vit_tiny_patch16_224"])
def test_the_head_rule_is_the_same_for_every_format(
    name: str, write: Callable[[nn.Module, Path], Path], tmp_path: Path
) -> None:
    source = build(name, classes=7)
    path = write(source, tmp_path / "weights")
    same = build(name, classes=7)
    weights.load(same, path)
    assert_same(same, source)
    other = build(name, classes=3)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=r"2 of another shape \(head.weight \(7, .* for \(3, .* head.bias"):
        weights.load(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    weights.load(other, path, new_head=True)
    assert_same(other, source, but=("head.",))
    assert torch.equal(other.head.weight, before["head.weight"])
    headless = build(name, classes=0)
    weights.load(headless, path, new_head=True)
    assert torch.equal(headless.norm.weight, source.norm.weight)


def test_what_a_models_own_loader_passes_over_is_missing(tmp_path: Path) -> None:
    source = build("vit_tiny_patch16_224")
    arrays = vit_arrays(source)
    del arrays["head/kernel"], arrays["head/bias"]
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(CheckpointMismatch, match=r"2 missing \(head.weight, head.bias\)"):
        weights.load(build("vit_tiny_patch16_224"), tmp_path / "vit.npz")


def test_mixers_of_timm_and_ours_with_sparse_blocks_left_out_take_googles_file(tmp_path: Path) -> None:
    source = timm.create_model("mixer_t4_32", mlp_ratio=(0.5, 4.0), num_blocks=1)
    path = _write_npz(source, tmp_path / "mixer")
    model = timm.create_model("sparse_mlp_t4_32", num_blocks=1, sparse_blocks=0)
    weights.load(model, path)
    assert_same(model, source)


@pytest.mark.parametrize("name", ["hire_mlp_tiny", "resnet10t"])
def test_batch_norms_without_counters_are_taken(name: str, tmp_path: Path) -> None:
    source = timm.create_model(name)
    old = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert convert(old, name).keys() == source.state_dict().keys()
    torch.save(old, tmp_path / "old.pth")
    target = timm.create_model(name)
    weights.load(target, tmp_path / "old.pth")
    assert_same(target, source)
    del old[next(key for key in old if key.endswith("running_mean"))]
    with pytest.raises(CheckpointMismatch, match="2 missing"):  # the counter beside it as well
        convert(old, name)


def test_a_feature_extractor_takes_its_part_of_a_classifier(tmp_path: Path) -> None:
    source = build("cycle_mlp_b1")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("cycle_mlp_b1", features_only=True, **SMALL["cycle_mlp_b1"])
    weights.load(model, tmp_path / "weights.pth")
    assert torch.equal(model.model.stages[3].blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight)


def _declare_huge_tensor(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}
    header = json.dumps({"stem.proj.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def _declare_huge_array(path: Path) -> None:
    np.savez(path, **{"stem/kernel": np.zeros(4)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'shape': (4,), }         ", b"'shape': (10000000000,),}"))


UNREADABLE = {
    "text.pth": lambda path: path.write_text("epoch,loss\n1,0.3\n"),
    "empty.pth": lambda path: path.write_bytes(b""),
    "malformed.pth": lambda path: path.write_bytes(b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01h\x07u."),
    "no_stack.pth": lambda path: path.write_bytes(b"\x80\x02."),
    "list.pth": lambda path: torch.save([1, 2], path),
    "object.pth": lambda path: torch.save({"w": nn.Linear(1, 1)}, path),
    "numbers.pth": lambda path: torch.save({"epoch": 3, "loss": 0.1}, path),
    "text.safetensors": lambda path: path.write_text("no weights at all, in a few words"),
    "huge.safetensors": _declare_huge_tensor,
    "text.npz": lambda path: path.write_text("no archive"),
    "foreign.npz": lambda path: np.savez(path, a=np.zeros(3)),
    "objects.npz": lambda path: np.savez(path, a=np.array([{}], dtype=object)),
    "huge.npz": _declare_huge_array,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_without_weights_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    UNREADABLE[name](path)
    with pytest.raises(UserError, match=re.escape(name)) as error:
        weights.load(build("mixer_t4_32"), path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(UserError) as error:
        convert_file(path, "cycle_mlp_b1", tmp_path / "out.safetensors")
    assert "\n" not in str(error.value) and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("wanted", ["cycle_mlp_b1", "sparse_mlp_b16_224", "mixer_b16_224", "resnet10t"])
@pytest.mark.parametrize("name", ["hire_mlp_tiny", "sparse_mlp_t4_32", "vit_tiny_patch16_224"])
def test_weights_of_another_model_are_refused_in_one_line(name: str, wanted: str, tmp_path: Path) -> None:
    save_file(build(name).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"the weights do not fit {wanted}: \d+ matched, \d+ missing") as error:
        convert_file(tmp_path / "other.safetensors", wanted, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)


def test_convert_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").mkdir()
    save_file(build("cycle_mlp_b1").state_dict(), tmp_path / "in.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        convert_file(tmp_path / "in.safetensors", "cycle_mlp_b1", tmp_path / "out.safetensors")
