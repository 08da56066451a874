"""timm's contract, for every model this package registers.

After timm's own tests/test_models.py. The smallest model of each module runs here; the others are `slow`.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import timm
import torch
from timm.layers import DropPath, Format
from timm.models import is_model_in_modules, model_entrypoint
from timm.models._manipulate import group_parameters, reinit_non_persistent_buffers
from torch import nn

from sparse_mlp.models import registered_names

NAMES = registered_names()


def _module(name: str) -> str:
    return model_entrypoint(name).__module__


def _params(name: str) -> int:
    return sum(p.numel() for p in timm.create_model(name, device="meta").parameters())


def _smallest_of_each_module() -> set[str]:
    smallest: dict[str, str] = {}
    for name in sorted(NAMES, key=_params):
        smallest.setdefault(_module(name), name)
    return set(smallest.values())


SMALLEST = _smallest_of_each_module() | {"sparse_cycle_mlp_b1"}  # with experts in a pyramid, the same way in all
MODELS = [pytest.param(name, marks=() if name in SMALLEST else pytest.mark.slow) for name in NAMES]
every_model = pytest.mark.parametrize("name", MODELS)
each_system = pytest.mark.parametrize("name", sorted(SMALLEST))
each_family = pytest.mark.parametrize("name", sorted(SMALLEST | {"sparse_mlp_t4_32"}))  # the Mixer is the smaller one


def _input_size(name: str) -> tuple[int, int]:
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[1:] if cfg.fixed_input_size else (64, 64)


def _images(name: str, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *_input_size(name), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def built():
    """A model per name, in eval mode, built once; tests that change it take a copy."""
    models: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in models:
            models.clear()
            torch.manual_seed(0)
            models[name] = timm.create_model(name, num_classes=10).eval()
        return models[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    assert cfg["num_classes"] == model.num_classes == model.get_classifier().out_features
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    first_conv = model.get_submodule(cfg["first_conv"])
    assert first_conv.weight.shape[1] == cfg["input_size"][0] or isinstance(first_conv, nn.Linear)
    assert len(cfg["mean"]) == len(cfg["std"]) == 3
    assert 0 < cfg["crop_pct"] <= 1 and cfg["interpolation"] == "bicubic"
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())
    if cfg["pool_size"]:
        features = model.forward_features(torch.zeros(1, *cfg["input_size"], device="meta"))
        assert features.shape[2:] == cfg["pool_size"] and features.shape[1] == model.num_features


@pytest.mark.parametrize("name", NAMES)
def test_is_registered_under_a_documented_entrypoint(name):
    assert model_entrypoint(name).__doc__
    assert is_model_in_modules(name, [_module(name).rsplit(".", 1)[-1]])
    assert callable(importlib.import_module(_module(name)).checkpoint_filter_fn)


@every_model
def test_forward_is_head_of_features(name, built):
    model, images = built(name), _images(name)
    with torch.inference_mode():
        features = model.forward_features(images)
        logits = model(images)
        torch.testing.assert_close(logits, model.forward_head(features), rtol=0, atol=0)
        pooled = model.forward_head(features, pre_logits=True)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert pooled.shape == (2, model.head_hidden_size)
    assert model.num_features in features.shape


@every_model
def test_reset_classifier(name, built):
    model, images = copy.deepcopy(built(name)), _images(name)
    with torch.inference_mode():
        features = model.forward_features(images)
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(images).shape == features.shape
        model.reset_classifier(7, "avg")
        assert model(images).shape == (2, 7) and model.num_classes == 7
    assert isinstance(model.get_classifier(), nn.Linear)


@every_model
def test_every_parameter_gets_a_gradient(name, built):
    model = copy.deepcopy(built(name)).train()
    model(_images(name)).square().mean().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@every_model
def test_grad_checkpointing_changes_nothing(name, built):
    images, grads = _images(name), []
    for enable in (False, True):
        model = copy.deepcopy(built(name))
        model.set_grad_checkpointing(enable)
        loss = model(images).square().mean()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@every_model
def test_forward_intermediates(name, built):
    model, images = built(name), _images(name)
    count = len(model.feature_info)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(images)
        torch.testing.assert_close(features, model.forward_features(images), rtol=0, atol=0)
        assert len(maps) == count
        for info, value in zip(model.feature_info, maps, strict=True):
            assert value.shape[:2] == (2, info["num_chs"])
            assert value.shape[2:] == tuple(-(-side // info["reduction"]) for side in images.shape[2:])
        some = model.forward_intermediates(images, indices=[0, count - 2], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(some, [maps[0], maps[count - 2]], rtol=0, atol=0)
        last = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
    assert (last - maps[-1]).abs().max() > 0


@every_model
def test_prune_intermediate_layers(name, built):
    model, images = copy.deepcopy(built(name)), _images(name)
    keep = [0, len(model.feature_info) - 2]
    with torch.inference_mode():
        expected = model.forward_intermediates(images, indices=keep, intermediates_only=True)
        before = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers(keep, prune_norm=True) == keep
        pruned = model.forward_intermediates(images, indices=keep, intermediates_only=True)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=0)
    assert sum(p.numel() for p in model.parameters()) < before


@every_model
def test_features_only(name):
    info = timm.create_model(name, device="meta").feature_info
    reductions = [entry["reduction"] for entry in info]
    assert reductions == sorted(reductions)
    pyramid = len(set(reductions)) > 1
    indices = (1, 3) if pyramid else (0, len(info) - 1)
    model = timm.create_model(name, features_only=True, out_indices=indices)
    images = _images(name)
    maps = model(images)
    assert [value.shape[1] for value in maps] == model.feature_info.channels()
    for value, reduction in zip(maps, model.feature_info.reduction(), strict=True):
        assert value.shape[2:] == tuple(-(-side // reduction) for side in images.shape[2:])
    if pyramid:
        assert timm.create_model(name, features_only=True, device="meta").feature_info.reduction() == [4, 8, 16, 32]
    sum(value.square().mean() for value in maps).backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    assert unused == []  # an unused parameter stops DistributedDataParallel


@each_family
@pytest.mark.parametrize("feature_cls", ["fx", "hook"])
def test_features_by_graph_and_by_hooks_are_those_of_the_getter(name, feature_cls):
    maps, images = {}, _images(name)
    for kind in ("getter", feature_cls):
        torch.manual_seed(0)
        model = timm.create_model(name, features_only=True, feature_cls=kind, out_indices=(1, 3)).eval()
        with torch.inference_mode():
            maps[kind] = model(images)
    for value, expected in zip(maps[feature_cls], maps["getter"], strict=True):
        if value.dim() == 4:  # (B, H, W, C) in, (B, S, C) for tokens
            assert model.output_fmt == Format.NHWC
            value = value.permute(0, 3, 1, 2)
        else:
            value = value.transpose(1, 2).reshape(expected.shape)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@each_family
def test_weights_and_buffers_are_right_after_the_meta_device(name):
    model = timm.create_model(name, num_classes=10, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    torch.manual_seed(0)
    model.init_weights()
    reinit_non_persistent_buffers(model)
    usual = timm.create_model(name, num_classes=10)
    for key, buffer in usual.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    for key, parameter in usual.named_parameters():
        drawn, expected = model.get_parameter(key), parameter
        assert drawn.isfinite().all(), key
        spread = pytest.approx(expected.std().item(), rel=0.5) if expected.numel() > 100 else pytest.approx(0, abs=2)
        assert drawn.std(correction=0).item() == spread, key
    assert model.eval()(_images(name)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_go_from_stem_to_head(name):
    model = timm.create_model(name, device="meta")
    parameters = dict(model.named_parameters())
    assert getattr(model, "no_weight_decay", set)() <= set(parameters)  # timm's own Mixer has none
    for coarse in (False, True):
        layer_of = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(layer_of) == set(parameters)
        first, last = model.default_cfg["first_conv"], model.default_cfg["classifier"]
        assert layer_of[f"{first}.weight"] == 0
        assert layer_of[f"{last}.weight"] == max(layer_of.values())
        in_order = [layer_of[key] for key in parameters if key.startswith(("stages.", "blocks."))]
        assert in_order == sorted(in_order)
    assert max(group_parameters(model, model.group_matcher(coarse=False), reverse=True).values()) >= 4


@every_model
def test_constructor_arguments_reach_the_model(name):
    model = timm.create_model(name, in_chans=4, num_classes=3, drop_path_rate=0.3, drop_rate=0.1)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(0.3) and rates == sorted(rates)
    assert model.eval()(_images(name, channels=4)).shape == (2, 3)
    assert timm.create_model(name, num_classes=0)(_images(name)).shape == (2, model.num_features)
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model(name, no_such_option=1)


@each_system
def test_img_size(name):
    model = timm.create_model(name, img_size=96, num_classes=3).eval()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 3)


@every_model
def test_is_built_in_the_wanted_dtype(name):
    model = timm.create_model(name, dtype=torch.bfloat16, device="cpu").eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        logits = model(_images(name).bfloat16())
        assert logits.dtype == torch.bfloat16
        # an untrained Hire-MLP-L on its running statistics, 0 and 1, may overflow bfloat16
        assert name.endswith("hire_mlp_large") or logits.isfinite().all()
        assert model.train()(_images(name).bfloat16()).isfinite().all()


@each_system
def test_pretrained_loading_follows_timms_rules(name, tmp_path):
    source = timm.create_model(name).eval()
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, file)
    overlay = {"file": str(file)}
    same = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    images = _images(name, batch=1)
    with torch.inference_mode():
        torch.testing.assert_close(same(images), source(images), rtol=0, atol=0)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    key, classifier = other.default_cfg["first_conv"] + ".weight", other.default_cfg["classifier"]
    torch.testing.assert_close(other.state_dict()[key], source.state_dict()[key].sum(1, keepdim=True))
    kept = [k for k in other.state_dict() if k != key and not k.startswith(classifier)]
    assert all(torch.equal(other.state_dict()[k], source.state_dict()[k]) for k in kept)
    with pytest.raises(RuntimeError, match="head"):
        timm.create_model(name, num_classes=5, checkpoint_path=str(file))


@each_system
def test_local_directory_round_trip(name, tmp_path, built):
    model = built(name)
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": 10})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(_images(name)), model(_images(name)), rtol=0, atol=0)


@every_model
def test_channels_last_and_bf16_autocast(name, built):
    model, images = built(name), _images(name)
    with torch.inference_mode():
        expected = model(images)
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            channels_last(images.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5
        )
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    # In bfloat16 the near ties of an untrained router send some items to other experts, whose weights are unlike.
    allowed = 0.5 if name.startswith("sparse_") else 0.1
    assert (half.float() - expected).abs().max() <= allowed * expected.abs().max()


@each_system
def test_compiles_as_one_graph(name, built):
    model, images = copy.deepcopy(built(name)), _images(name)
    torch.compiler.reset()
    # tracing is what can break; the code generator behind it takes minutes and is not ours
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    compiled(images).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@each_system
def test_exports_with_dynamic_batch(name, built):
    model, images = built(name), _images(name)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    more = torch.cat([images, images[:1]])
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # tens of seconds per model
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@each_system
def test_onnx_runtime_agrees(name, built, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = built(name), _images(name)
    file = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images,), file, dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for x in (images, torch.cat([images, images[:1]])):
        with torch.inference_mode():
            expected = model(x)
        (logits,) = session.run(None, {"x": x.numpy()})
        assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)
