from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from sparse_mlp.engine import Loaders, OptimConfig, RunFolder, ScheduleConfig, TrainConfig, Trainer
from sparse_mlp.tasks import Classify, Probe

# One model with experts, noise and drop path, and one with batch norms: what differs between training and evaluation.
MODELS = {
    "sparse": ("sparse_mlp_t4_32", {"num_blocks": 2, "embed_dim": 16, "sparse_blocks": 1, "drop_path_rate": 0.5}),
    "resnet": ("resnet10t", {}),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = MODELS[kind]
    return timm.create_model(name, num_classes=3, **arguments)


def batches(number: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(6, 3, 32, 32, generator=generator),
            "target": torch.randint(0, 3, (6,), generator=generator),
            "index": torch.arange(6) + 6 * i,
        }
        for i in range(number)
    ]


def loaders() -> Loaders:
    def train(*, start_step: int, steps: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
        return batches()[start_step : start_step + steps]

    return Loaders(train, lambda **_: batches(2), batch_size=6, steps_per_epoch=4)


@pytest.mark.parametrize("kind", MODELS)
def test_training_changes_the_classifier_and_not_one_bit_of_the_backbone(kind: str, tmp_path: Path):
    model = build(kind)
    probe = Probe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        probe,
        loaders(),
        optim=OptimConfig(opt="sgd", lr=1.0, weight_decay=0.0),
        schedule=ScheduleConfig(),
        train=TrainConfig(steps=4, device="cpu"),
        run=RunFolder(tmp_path),
    )
    trainer.fit(show=False)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(probe.head_names) and len(changed) == 2
    assert not any(module.training for module in model.modules())


def test_a_step_is_one_of_logistic_regression_on_the_features(tmp_path: Path):
    model = build("sparse")
    probe, batch = Probe(model), batches(1)[0]
    head = model.get_classifier()
    with torch.no_grad():
        features = model.forward_head(model.eval().forward_features(batch["image"]), pre_logits=True)
    weight = head.weight.detach().clone().requires_grad_()
    bias = head.bias.detach().clone().requires_grad_()
    F.cross_entropy(features @ weight.T + bias, batch["target"]).backward()
    probe.train()
    probe(batch)["loss"].backward()
    assert torch.allclose(head.weight.grad, weight.grad, atol=1e-7)
    assert torch.allclose(head.bias.grad, bias.grad, atol=1e-7)
    assert [id(p) for group in probe.param_groups(0.0, None) for p in group["params"]] == [*map(id, head.parameters())]


def test_a_backbone_that_changed_is_noticed():
    model = build("resnet")
    probe = Probe(model)
    probe.evaluate(batches(1), torch.device("cpu"))
    model.bn1.running_mean[0] += 1e-7
    with pytest.raises(AssertionError, match="has changed"):
        probe.evaluate(batches(1), torch.device("cpu"))


def test_options_that_a_probe_would_ignore():
    with pytest.raises(ValueError, match=r"layer_decay 0\.5 would be ignored"):
        Probe(build("sparse")).param_groups(0.0, 0.5)
    with pytest.raises(ValueError, match="needs one linear layer"):
        Probe(_without_linear_head())


def _without_linear_head() -> nn.Module:
    model = build("sparse")
    model.head = nn.Sequential(nn.Linear(16, 3))
    return model


def test_images_of_one_class_teach_nothing():
    model = timm.create_model("resnet10t", num_classes=1)
    with pytest.raises(ValueError, match="cat is the only class"):
        Classify(model, class_names=["cat"])
