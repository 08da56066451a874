from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import sparse_mlp.models  # noqa: F401 - registers the models
from sparse_mlp.engine import OptimConfig, TrainConfig
from sparse_mlp.engine.learner import Learner
from sparse_mlp.moe import telemetry
from sparse_mlp.tasks.features import skip_final_norm
from sparse_mlp.tasks.moco import Moco, MocoConfig, contrast, feature_rank, feature_std, momentum_at

GRADIENTS = Path(__file__).with_name("moco_gradients.py")
SMALL = {"num_blocks": 2, "embed_dim": 16, "patch_size": 8}
SPARSE = {**SMALL, "sparse_blocks": 1, "num_experts": (4, 4)}
HEADS = {"hidden_dim": 16, "out_dim": 8}


def make(model: str = "sparse_mlp_t4_32", args: dict | None = None, **config) -> Moco:
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=3, **(SPARSE if args is None else args))
    return Moco(network, MocoConfig(**HEADS, **config), num_classes=3)


def views(count: int = 6, size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(count, 3, size, size, generator=generator) for name in ("view1", "view2")}


def test_contrast_is_the_cross_entropy_of_the_cosines():
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    k = torch.tensor([[3.0, 0.0], [3.0, 4.0]])
    loss, accuracy = contrast(q, k, 0.2)
    # cosines / T: [5, 3] and [0, 4]; 2T = 0.4; the mean of log(1 + e^-2) and log(1 + e^-4)
    expected = 0.4 * (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-4))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy == 1


def naive_batch_norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


def naive_mlp(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Fresh batch norms have weight 1 and bias 0."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for linear in linears[:-1]:
        x = naive_batch_norm(x @ linear.weight.T).relu()
    return naive_batch_norm(x @ linears[-1].weight.T)


def test_a_step_is_algorithm_1():
    """Queries, momentum update, keys with the updated weights."""
    task, batch = make("mixer_t4_32", SMALL, momentum_sched=False, momentum=0.75), views()
    for parameter in [*task.encoder.parameters(), *task.projector.parameters()]:
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    before = copy.deepcopy(task)
    task.before_step(0, 1)
    out = task(batch)
    momentum = {
        name: 0.75 * value + 0.25 * dict(before.encoder.named_parameters())[name]
        for name, value in before.momentum_encoder.named_parameters()
    }
    for name, value in task.momentum_encoder.named_parameters():
        torch.testing.assert_close(value, momentum[name])
    key_encoder, key_projector = before.momentum_encoder, before.momentum_projector
    key_encoder.load_state_dict(momentum)
    for key, online in zip(key_projector.parameters(), before.projector.parameters(), strict=True):
        key.data = 0.75 * key + 0.25 * online
    queries, keys = [], []
    for view in (batch["view1"], batch["view2"]):
        queries.append(naive_mlp(before.predictor, naive_mlp(before.projector, before.encoder(view))))
        keys.append(naive_mlp(key_projector, key_encoder(view)).detach())
    loss = 0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        logits = F.normalize(q) @ F.normalize(k).T / 0.2
        loss = loss + 0.4 * F.cross_entropy(logits, torch.arange(6))
    torch.testing.assert_close(out["loss"], loss, rtol=1e-4, atol=1e-5)
    assert not any(value.requires_grad for name, value in out.items() if name != "loss")


def test_heads_are_the_published_ones():
    torch.manual_seed(0)
    task = Moco(timm.create_model("mixer_t4_32", **SMALL))
    assert [tuple(p.shape) for p in task.projector.parameters()] == [
        (4096, 16), (4096,), (4096,), (4096, 4096), (4096,), (4096,), (256, 4096)
    ]  # fmt: skip
    assert [tuple(p.shape) for p in task.predictor.parameters()] == [(4096, 256), (4096,), (4096,), (256, 4096)]


def test_the_moving_average_is_of_parameters_only():
    """Buffers of the momentum encoder move by its own forwards."""
    task = make("resnet10t", {})
    task.encoder.bn1.running_mean.fill_(7.0)
    task(views())
    own = task.momentum_encoder.bn1
    assert own.running_mean.abs().max() < 2 and own.num_batches_tracked == 2
    assert task.momentum_projector[1].num_batches_tracked == 2


def test_momentum_follows_a_cosine():
    task = make(momentum=0.9)
    found = []
    for step in (0, 25, 50, 75):
        task.before_step(step, 100)
        found.append(task.momentum)
    # 1 - 0.1 (1 + cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4
    assert found == pytest.approx([0.9, 1 - 0.05 * (1 + math.sqrt(0.5)), 0.95, 1 - 0.05 * (1 - math.sqrt(0.5))])
    assert momentum_at(100, 100, 0.9) == 1
    still = make(momentum=0.9, momentum_sched=False)
    still.before_step(50, 100)
    assert still.momentum == 0.9
    assert (task.schedules_over_run, still.schedules_over_run) == (True, False)


def balance_gradients(task: Moco, batch: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor]:
    """Gradients of the routers by weight / 2 x each layer's L_imp / 2 of each view, worked out beside the layers."""
    layers = telemetry.moe_layers(task.encoder)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in layers.values():
        layer.balance_scale.zero_()
        layer.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], module.router.weight)))
    for view in ("view1", "view2"):
        task.encoder(batch[view])
    total = 0
    for items, router in seen:
        importance = (items.reshape(-1, items.shape[-1]) @ router.T).softmax(-1).sum(0)
        total = total + weight / 2 * importance.var(correction=0) / importance.mean() ** 2 / 2
    routers = {name: layer.router.weight for name, layer in layers.items()}
    return dict(zip(routers, torch.autograd.grad(total, list(routers.values())), strict=True))


def test_balance_is_the_mean_of_both_views():
    """The engine's update moves the routers by the contrast's gradient and that of half of each view's balance loss."""
    args, batch = {**SPARSE, "noise_std": 0.0, "balance_weight": 500.0}, views()
    balance = balance_gradients(make(args=args), batch, 500.0)
    silent = make(args={**args, "balance_weight": 0.0})
    silent(batch)["loss"].backward()
    optim = OptimConfig(opt="momentum", lr=1.0, weight_decay=0.0)  # its first step is the gradient
    learner = Learner(make(args=args), optim, TrainConfig(steps=1), torch.device("cpu"))
    routers = {name: layer.router.weight for name, layer in telemetry.moe_layers(learner.task.encoder).items()}
    start = {name: weight.detach().clone() for name, weight in routers.items()}
    values = learner.update(batch, 0, 10, measure=True)
    for name, layer in telemetry.moe_layers(silent.encoder).items():
        expected = layer.router.weight.grad + balance[name]
        torch.testing.assert_close(start[name] - routers[name].detach(), expected, rtol=1e-3, atol=1e-6)
        assert balance[name].abs().max() > 1e-4, "the comparison could not fail"
    assert values["first_grad_norm"] > 0


def test_the_momentum_encoder_routes_without_noise_and_reports_nothing():
    task = make(args={**SPARSE, "noise_std": 5.0, "drop_path_rate": 0.5})
    before = copy.deepcopy(task)
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        keys.append(task.momentum_encoder(views()["view1"]))
    assert torch.equal(*keys)
    torch.manual_seed(1)
    assert not torch.equal(task.encoder(views()["view1"]), keys[0])
    task = before
    task(views())["loss"].backward()
    assert all(p.grad is None for p in [*task.momentum_encoder.parameters(), *task.momentum_projector.parameters()])
    assert all(stats.load.sum() == 0 for stats in telemetry.collect(task.momentum_encoder).values())
    assert all(stats.load.sum() > 0 for stats in telemetry.collect(task.backbone()).values())
    assert task.eval().momentum_projector[1].training is False
    assert task.train().momentum_projector[1].training is True
    assert not any(module.training for module in task.momentum_encoder.modules())


TINY = {
    "sparse_mlp_t4_32": SPARSE,
    "mixer_t4_32": SMALL,
    "as_mlp_tiny": {"depths": (1, 1, 1, 1), "embed_dim": 24},
    "cycle_mlp_b1": {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64)},
    "hire_mlp_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64)},
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "resmlp_12_224": {"img_size": 32},
    "gmlp_s16_224": {"img_size": 32},
}


@pytest.mark.parametrize("name", TINY)
def test_every_backbone_learns_and_is_exported_bare(name):
    task = make(name, TINY[name])
    start = {n: p.detach().clone() for n, p in task.named_parameters() if not p.requires_grad}
    groups = task.param_groups(0.1, None)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    out = task(views(4))
    out["loss"].backward()
    bare = [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert bare == [], "DistributedDataParallel cannot have unused parameters"
    assert task.gradient_metrics()["first_grad_norm"] > 0
    optimizer.step()
    frozen = [n for n in start if n.startswith("encoder.")]
    assert all(torch.equal(dict(task.named_parameters())[n], start[n]) for n in frozen)
    patches = name not in ("resnet10t", "cycle_mlp_b1", "hire_mlp_tiny")  # whose first convolutions overlap
    assert bool(frozen) == patches
    model = timm.create_model(name, num_classes=0, **TINY[name])
    model.load_state_dict(task.backbone().state_dict())
    image = views(2)["view1"]
    torch.testing.assert_close(model.eval()(image), task.eval().backbone()(image))


def test_the_final_norm_may_be_left_out_and_the_weights_still_fit():
    backbone = timm.create_model("mixer_t4_32", **SMALL)
    skip_final_norm(backbone)
    task = Moco(backbone, MocoConfig(hidden_dim=16, out_dim=8))
    image = views(2)["view1"]
    model = timm.create_model("mixer_t4_32", num_classes=0, **SMALL)
    model.load_state_dict(task.backbone().state_dict())
    with_norm = model.eval()(image)
    model.norm = nn.Identity()
    found = task.eval().backbone()(image)
    torch.testing.assert_close(found, model(image))
    assert not torch.allclose(found, with_norm)
    with pytest.raises(ValueError, match="no final norm"):
        skip_final_norm(timm.create_model("resnet10t"))


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("sparse_mlp_t4_32", {**SPARSE, "noise_std": 0.0, "balance_weight": 1.0}),
        ("hire_mlp_tiny", TINY["hire_mlp_tiny"]),
    ],
)
def test_two_ranks_are_one(model, args, launch, tmp_path):
    found = {}
    for ranks in (1, 2):
        out, errors = str(tmp_path / str(ranks)), []
        spec = {"model": model, "args": args, "out": out}
        assert launch(GRADIENTS, spec, ranks=ranks, errors=errors) == [0] * ranks, errors
        found[ranks] = torch.load(out, weights_only=True)
    assert found[1].keys() == found[2].keys()
    # of the largest: rounding in batch norms over eight images adds up
    largest = max(value.abs().max().item() for name, value in found[1].items() if not name.startswith("state"))
    for name, value in found[1].items():
        assert (found[2][name] - value).abs().max() <= 1e-5 * largest, name


def evaluation_batches(images: torch.Tensor, labels: torch.Tensor, bank: int):
    for start in range(0, len(images), 5):
        rows = torch.arange(len(images))[start : start + 5]
        index = torch.where(rows < bank, rows, rows - bank)
        yield {"image": images[rows], "target": labels[rows], "index": index, "bank": rows < bank}


def test_evaluation_is_the_knn_of_the_features_and_leaves_no_trace():
    task = make(args=SMALL, model="mixer_t4_32", knn_k=3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.randn(30, 3, 32, 32, generator=generator) + 3 * F.one_hot(labels, 3)[:, :, None, None]
    before = copy.deepcopy(task.state_dict())
    result = task.evaluate(evaluation_batches(images, labels, 20), torch.device("cpu"))
    assert task.training and task.encoder.training and not task.momentum_encoder.training
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert result.predictions["index"].tolist() == list(range(10))
    guess = result.predictions["logits"].argmax(1)
    assert result.metrics["knn_top1"] == (guess == labels[20:].numpy()).mean() > 0.8
    assert result.metrics["images"] == 10
    without = task.evaluate(evaluation_batches(images, labels, 0), torch.device("cpu"))
    assert "knn_top1" not in without.metrics and without.metrics["images"] == 30
    with pytest.raises(ValueError, match="no images to evaluate on"):
        task.evaluate(evaluation_batches(images, labels, 30), torch.device("cpu"))


def test_collapse_is_seen():
    torch.manual_seed(0)
    assert feature_std(torch.ones(50, 8)) < 1e-6
    assert feature_std(torch.randn(4000, 8)) == pytest.approx(1, abs=0.02)
    assert feature_rank(torch.ones(50, 8)) == pytest.approx(1, abs=1e-6)
    assert feature_rank(torch.randn(4000, 8)) == pytest.approx(8, abs=0.05)
    plane = torch.cat((torch.randn(400, 2), torch.zeros(400, 6)), 1)
    assert feature_rank(plane) == pytest.approx(2, abs=0.01)


def test_weight_decay_spares_norms_unless_told():
    task = make()
    spared = next(group["params"] for group in task.param_groups(0.1, None) if group["weight_decay"] == 0)
    assert {id(p) for p in spared} >= {id(p) for n, p in task.encoder.named_parameters() if n.endswith("bias")} - {
        id(p) for p in task.encoder.parameters() if not p.requires_grad
    }
    (group,) = make(decay_all=True).param_groups(0.1, None)
    assert group["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="layer_decay"):
        task.param_groups(0.1, 0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"task.temperature 0.0 is not positive"),
        ({"knn_temperature": -1.0}, "task.knn_temperature -1.0 is not positive"),
        ({"momentum": 1.2}, r"task.momentum 1.2 is not in \[0, 1\]"),
        ({"momentum": -0.1}, "task.momentum -0.1"),
        ({"hidden_dim": 0}, "task.hidden_dim 0 is below 1"),
        ({"knn_images": -1}, "task.knn_images -1 is below 0"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MocoConfig(**options)


def test_what_a_model_lacks_is_named():
    with pytest.raises(ValueError, match="ResNet has no patch embedding"):
        make("resnet10t", {}, freeze_patch_embed=True)
    with pytest.raises(ValueError, match="one image has nothing to contrast"):
        make()(views(1))
    free = make(freeze_patch_embed=False)
    assert free.encoder.stem.proj.weight.requires_grad
