"""Features are those of evaluation mode, and taking them leaves no trace."""

import timm
import torch

import sparse_mlp  # noqa: F401
from sparse_mlp.tasks.features import extract_features, pooled_features


def batches(count, size=32):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, size, size, generator=generator)
    whole = {"image": image, "target": torch.arange(count) % 3, "index": torch.arange(count) * 2}
    return whole, [{name: value[a : a + 4] for name, value in whole.items()} for a in range(0, count, 4)]


def test_features_do_not_depend_on_the_batches_and_leave_the_model_as_it_was():
    model = timm.create_model("resnet10t", num_classes=3).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, parts = batches(10)
    features, labels, index = extract_features(model, parts, torch.device("cpu"))
    assert torch.equal(labels, whole["target"])
    assert torch.equal(index, whole["index"])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not features.requires_grad
    model.eval()
    torch.testing.assert_close(features, pooled_features(model, whole["image"]).detach())


def test_features_are_what_the_model_gives_without_a_classifier():
    for name in ("sparse_mlp_t4_32", "resnet10t"):
        model = timm.create_model(name, num_classes=5).eval()
        image = torch.randn(2, 3, 32, 32)
        features = pooled_features(model, image)
        model.reset_classifier(0)
        torch.testing.assert_close(features, model(image))
