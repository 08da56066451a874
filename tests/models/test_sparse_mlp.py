"""Sparse-MLP: sizes, ablation switches, published Mixer weights, other image sizes, compile and export."""

import copy
import re
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp.models.sparse_mlp import SparseBlock, SparseMlp, checkpoint_filter_fn
from sparse_mlp.moe import MoeMlp, eager


def small(**kwargs) -> SparseMlp:
    """t4_32 with a head that says something: timm's starts at zero."""
    torch.manual_seed(0)
    model = timm.create_model("sparse_mlp_t4_32", **kwargs)
    nn.init.normal_(model.head.weight, std=0.1)
    for layer in model.modules():
        if isinstance(layer, MoeMlp):
            nn.init.normal_(layer.router.weight, std=0.3)
    return model.eval()


def macs(model: nn.Module, size: int) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, size, size))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "parameters", "without_head", "gmacs"),
    [
        ("sparse_mlp_s16_224", 22_394_904, 21_881_904, 4.24),
        ("sparse_mlp_b16_224", 70_745_768, 69_976_768, 13.54),
        ("sparse_mlp_l16_224", 131_205_456, 130_436_456, 17.49),
    ],
)
def test_sizes_are_the_papers(name: str, parameters: int, without_head: int, gmacs: float) -> None:
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs(model, 224) / 1e9 == pytest.approx(gmacs, rel=0.01)
    model.reset_classifier(0)
    assert sum(p.numel() for p in model.parameters()) == without_head


@pytest.mark.parametrize("size", ["t4", "s4"])
def test_the_small_mixers_have_the_sparse_models_multiply_adds(size: str) -> None:
    sparse, dense = (timm.create_model(f"{family}_{size}_32").eval() for family in ("sparse_mlp", "mixer"))
    assert macs(dense, 32) == pytest.approx(macs(sparse, 32), rel=0.01)


def test_without_sparse_blocks_it_is_timms_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = timm.create_model("mixer_b16_224").eval()
    nn.init.normal_(mixer.head.weight, std=0.02)
    model = timm.create_model("sparse_mlp_b16_224", sparse_blocks=0).eval()
    model.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), mixer(x), atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(eager, "_ONEDNN", False)  # with timm's products: to the bit
        assert torch.equal(model(x), mixer(x))


def test_block_is_the_papers_algorithm(naive_moe) -> None:
    torch.manual_seed(0)
    block = SparseBlock(8, 6, num_experts=(3, 2), top_k=(1, 2)).eval().double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    r = block.rerepresent_in
    act = nn.functional.gelu
    u = act(r.token_proj(r.token_norm(x).transpose(1, 2)).transpose(1, 2))
    u = act(r.channel_proj(r.channel_norm(u)))
    assert u.shape == (2, 12, 4)  # S1 = 2 S, C1 = C / 2
    u = u + naive_moe(block.mlp_tokens, block.norm1(u).transpose(1, 2)).transpose(1, 2)
    u = u + naive_moe(block.mlp_channels, block.norm2(u))
    r = block.rerepresent_out
    u = act(r.channel_proj(r.channel_norm(u)))
    u = act(r.token_proj(r.token_norm(u).transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(block(x), u)


def sparse_ones(model: SparseMlp) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if isinstance(block, SparseBlock)]


@pytest.mark.parametrize(
    ("kwargs", "check"),
    [
        ({"top_k": (2, 1)}, lambda m: (m.blocks[5].mlp_tokens.top_k, m.blocks[5].mlp_channels.top_k) == (2, 1)),
        ({"num_experts": (4, 16)}, lambda m: m.blocks[5].mlp_channels.experts.fc1.weight.shape[0] == 16),
        ({"sparse_blocks": (0, 1)}, lambda m: sparse_ones(m) == [0, 1]),
        ({"sparse_blocks": 4}, lambda m: sparse_ones(m) == [2, 3, 4, 5]),
        ({"sparse_blocks": (-1,)}, lambda m: sparse_ones(m) == [5]),
        ({"rerepresent": False}, lambda m: m.blocks[5].rerepresent_in is None and m.blocks[5].mlp_tokens.dim == 64),
        ({"expert_hidden": (48, 96)}, lambda m: m.blocks[5].mlp_tokens.experts.fc1.weight.shape[2] == 48),
        ({"capacity_ratio": 1.05, "prioritized": True}, lambda m: m.blocks[5].mlp_tokens.prioritized),
        ({"rerepresent_scale": (1.0, 1.0)}, lambda m: m.blocks[5].mlp_channels.dim == 128),
        ({"noise_std": 0.0, "balance_weight": 0.1}, lambda m: m.blocks[5].mlp_tokens.balance_weight == 0.1),
        ({"act_layer": "gelu_tanh"}, lambda m: m.blocks[5].mlp_tokens.experts.gelu == "tanh"),
        ({"drop_path_rate": 0.1, "proj_drop_rate": 0.1}, lambda m: m.blocks[5].drop.p == 0.1),
    ],
)  # fmt: skip
def test_every_ablation_is_an_argument_and_trains(kwargs, check) -> None:
    model = timm.create_model("sparse_mlp_t4_32", **kwargs).train()
    assert check(model)
    nn.init.normal_(model.head.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small groups: capacities round
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    routers = [p.grad for n, p in model.named_parameters() if "router" in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in routers)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 33}, "img_size 33 is not divisible by patch_size 4"),
        ({"img_size": (32, 30)}, r"img_size \(32, 30\) is not divisible"),
        ({"sparse_blocks": 7}, "sparse_blocks 7 does not fit a model of 6 blocks"),
        ({"sparse_blocks": -1}, "sparse_blocks -1 must not be negative"),
        ({"sparse_blocks": (6,)}, r"sparse_blocks \(6,\) does not fit"),
        ({"num_experts": 8}, "num_experts must be a pair"),
        ({"top_k": (1, 5)}, r"top_k must be at most num_experts \(4\); got 5"),
        ({"capacity_ratio": 0.0}, "capacity_ratio must be above 0"),
        ({"rerepresent": False, "rerepresent_scale": (1.0, 1.0)}, "no effect"),
        ({"act_layer": "swish"}, "act_layer must be one of gelu, gelu_tanh; got 'swish'"),
        ({"embed_dim": 0}, "embed_dim must be a whole number of at least 1; got 0"),
        ({"embed_dim": 1.5}, "embed_dim must be a whole number"),
        ({"patch_size": 0}, "patch_size must be a whole number of at least 1"),
        ({"num_blocks": -1}, "num_blocks must be a whole number"),
        ({"mlp_ratio": 3}, "mlp_ratio must be a pair"),
        ({"rerepresent_scale": (1,)}, "rerepresent_scale must be a pair"),
        ({"rerepresent_scale": (0, 1)}, r"rerepresent_scale must be above 0; got \(0, 1\)"),
        ({"top_k": (1.5, 1)}, "top_k must be a pair"),
        ({"noise_std": float("nan")}, "noise_std must be a finite number; got nan"),
        ({"balance_weight": "much"}, "balance_weight must be a finite number; got 'much'"),
        ({"capacity_ratio": float("inf")}, "capacity_ratio must be a finite number"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("sparse_mlp_t4_32", **kwargs)


def test_image_alone_gives_what_it_gives_in_a_batch() -> None:
    model = small()
    x = torch.randn(5, 3, 32, 32) + torch.randn(5, 3, 1, 1)
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(model(x[:1]), whole[:1], atol=1e-6, rtol=0)
        assert torch.equal(model(x), whole)


def google_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """A Mixer's weights under the published names, kernels in x out."""
    parts = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "norm": "pre_head_layer_norm", "stem.proj": "stem"}
    parts |= {"mlp_tokens": "token_mixing", "mlp_channels": "channel_mixing", "fc1": "Dense_0", "fc2": "Dense_1"}
    arrays = {}
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        published = re.sub(r"^blocks\.(\d+)", r"MixerBlock_\1", key.replace("stem.proj", "stem"))
        published = "/".join(parts.get(part, part) for part in published.split("."))
        weight = "scale" if "norm" in key else "kernel"
        published = re.sub("weight$", weight, published)
        if published.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        arrays[published] = array
    return arrays


def test_googles_npz_loads_through_timm(tmp_path) -> None:
    mixer = timm.create_model("mixer_t4_32", mlp_ratio=(0.5, 4.0)).eval()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.1)
    np.savez(tmp_path / "Mixer-T_4.npz", **google_arrays(mixer))
    model = timm.create_model(
        "sparse_mlp_t4_32", sparse_blocks=0, checkpoint_path=str(tmp_path / "Mixer-T_4.npz")
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), mixer(x))
    with pytest.raises(ValueError, match="unexpected entry 'opt/momentum'"):
        checkpoint_filter_fn({"opt/momentum": np.zeros(1)}, model)


def test_weights_load_as_pretrained_with_other_classes_channels_and_size(tmp_path) -> None:
    model = small()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    same = timm.create_model("sparse_mlp_t4_32", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(same(x), model(x))
    other = timm.create_model(
        "sparse_mlp_t4_32",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=7,
        in_chans=1,
        img_size=(48, 64),
    )
    assert other(torch.randn(2, 1, 48, 64)).shape == (2, 7)
    assert other.patch_grid == (12, 16)


def test_resampling_repeated_tokens_keeps_the_function() -> None:
    """Twice the re-represented tokens, each copy read with half its weight: the same logits."""
    model = small()
    wide = small(rerepresent_scale=(4.0, 0.5), expert_hidden=(128, 256))
    wide.load_state_dict(checkpoint_filter_fn(model.state_dict(), wide))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), model(x), atol=1e-5, rtol=1e-4)
    back = small()
    back.load_state_dict(checkpoint_filter_fn(wide.state_dict(), back))
    torch.testing.assert_close(back.state_dict(), model.state_dict(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rerepresent", [True, False])
def test_resampling_to_another_image_size_keeps_uniform_responses(rerepresent: bool) -> None:
    """Weights that treat all patches alike respond to a uniform image as before, at any size."""
    model = small(rerepresent=rerepresent)
    token_axis = {"mlp_tokens.fc1.weight": 1, "mlp_tokens.fc2.weight": 0, "mlp_tokens.fc2.bias": 0}
    if rerepresent:
        token_axis |= {"rerepresent_in.token_proj.weight": 1}
        token_axis |= {"rerepresent_out.token_proj.weight": 0, "rerepresent_out.token_proj.bias": 0}
    else:
        token_axis |= {"mlp_tokens.router.weight": 1, "mlp_tokens.experts.fc1.weight": 1}
        token_axis |= {"mlp_tokens.experts.fc2.weight": 2, "mlp_tokens.experts.fc2.bias": 1}
    for name, parameter in model.named_parameters():
        axis = token_axis.get(name.split(".", 2)[-1])
        if axis is not None:
            parameter.data = parameter.data.mean(axis, keepdim=True).expand_as(parameter).clone()
    larger = timm.create_model("sparse_mlp_t4_32", img_size=64, rerepresent=rerepresent).eval()
    larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
    colour = torch.randn(2, 3, 1, 1)
    with torch.no_grad():
        wanted, got = model(colour.expand(2, 3, 32, 32)), larger(colour.expand(2, 3, 64, 64))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def test_resampling_from_no_square_image_is_refused() -> None:
    model = small(img_size=(32, 48))
    with pytest.raises(ValueError, match="96 patches come from no square image"):
        checkpoint_filter_fn(model.state_dict(), small())


def test_a_foreign_state_dict_passes_through_the_filter() -> None:
    foreign = {"layer1.weight": torch.zeros(3)}
    assert checkpoint_filter_fn(foreign, small()) == foreign


def test_deepcopy_and_gradient_checkpointing_after_a_step() -> None:
    model = small(drop_path_rate=0.2).train()
    x = torch.randn(4, 3, 32, 32)

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        model(x).sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients(model)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for a, b in zip(plain, gradients(twin), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kwargs", [{}, {"capacity_ratio": 1.5, "eval_capacity_ratio": 4.0}])
def test_exports_with_dynamic_batch(kwargs) -> None:
    model = small(**kwargs)
    x = torch.randn(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for count in (1, 2, 7):
            x = torch.randn(count, 3, 32, 32)
            torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-4)


def test_compiles_to_one_graph_in_training() -> None:
    model = small().train()
    for layer in model.modules():
        if isinstance(layer, MoeMlp):
            layer.router.noise_std = 0.0
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # the exporter takes half a minute
@pytest.mark.filterwarnings("ignore")
def test_runs_in_onnxruntime_with_dynamic_batch(tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small()
    path = str(tmp_path / "model.onnx")
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.onnx.export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=shapes, dynamo=True).save(path)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 2, 7):
        x = torch.randn(count, 3, 32, 32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-4)


def test_tokens_are_rows_in_memory_from_the_stem_on() -> None:
    """As columns, the layout of a convolution's result, every norm would copy them."""
    model = timm.create_model("sparse_mlp_t4_32", embed_dim=16, num_blocks=3, sparse_blocks=1, rerepresent=False)
    inputs = []
    for block in model.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(torch.randn(2, 3, 32, 32))
    assert [x.shape for x in inputs] == [(2, 64, 16)] * 3
    assert all(x.is_contiguous() for x in inputs)
