from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn

from sparse_mlp.tasks import Classify, ClassifyConfig


class Pixels(nn.Module):
    """Logits are the pixels themselves."""

    def __init__(self, num_classes=6):
        super().__init__()
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, image):
        return self.dropout(image.flatten(1)) * self.scale


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(40, 1, 2, 3, generator=generator)
    return {"image": image, "target": torch.randint(0, 6, (40,), generator=generator), "index": torch.arange(40)}


def split(batch, *sizes):
    pieces = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: pieces[name][i] for name in batch} for i in range(len(sizes))]


def test_cross_entropy_with_smoothing(batch):
    task = Classify(Pixels(), ClassifyConfig(smoothing=0.1)).eval()
    values = task(batch)
    expected = F.cross_entropy(batch["image"].flatten(1), batch["target"], label_smoothing=0.1)
    torch.testing.assert_close(values["loss"], expected)
    assert values["accuracy"] == (batch["image"].flatten(1).argmax(1) == batch["target"]).float().mean()
    assert not values["accuracy"].requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_of_mixing(smoothing, batch):
    shares = torch.softmax(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    task = Classify(Pixels(), ClassifyConfig(smoothing=smoothing)).eval()
    expected = F.cross_entropy(batch["image"].flatten(1), shares, label_smoothing=smoothing)
    torch.testing.assert_close(task({**batch, "target": shares})["loss"], expected)
    hard = F.one_hot(batch["target"], 6).float()
    torch.testing.assert_close(task({**batch, "target": hard})["loss"], task(batch)["loss"])


def test_sigmoids_are_summed_over_the_classes(batch):
    """The loss of the Mixer's pre-training: binary cross-entropy per class, summed, mean over the images."""
    task = Classify(Pixels(), ClassifyConfig(loss="bce", smoothing=0.12)).eval()
    target = F.one_hot(batch["target"], 6) * 0.88 + 0.02
    p = torch.sigmoid(batch["image"].flatten(1))
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(task(batch)["loss"], expected)


def test_evaluation_is_exact_however_the_images_come(batch):
    task = Classify(Pixels(), ClassifyConfig(smoothing=0.3))
    task.train()
    logits, target = batch["image"].flatten(1).numpy(), batch["target"].numpy()
    expected = {
        "loss": log_loss(target, torch.from_numpy(logits).double().softmax(1).numpy(), labels=range(6)),
        "top1": top_k_accuracy_score(target, logits, k=1, labels=range(6)),
        "top5": top_k_accuracy_score(target, logits, k=5, labels=range(6)),
        "images": 40,
    }
    shuffled = {name: value[torch.randperm(40)[:0]] for name, value in batch.items()}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    shuffled = {name: value[order] for name, value in batch.items()}
    padded = [*split(shuffled, 16, 16, 8), split(shuffled, 3, 37)[0]]  # the last one repeats three images
    for loader in ([batch], split(batch, 7, 30, 3), padded):
        evaluation = task.evaluate(loader, torch.device("cpu"))
        assert evaluation.metrics == pytest.approx(expected)
        assert evaluation.metrics == task.evaluate([batch], torch.device("cpu")).metrics, "not to the bit"
        assert np.array_equal(evaluation.predictions["index"], np.arange(40))
        assert np.array_equal(evaluation.predictions["target"], target)
        assert np.array_equal(evaluation.predictions["logits"], logits)
        assert evaluation.predictions["logits"].dtype == np.float32
    assert task.training
    assert task.model.dropout.training


def test_images_of_a_stream_have_no_index(batch):
    stream = {**batch, "index": torch.full((40,), -1)}
    evaluation = Classify(Pixels()).evaluate(split(stream, 20, 20), torch.device("cpu"))
    assert evaluation.metrics["images"] == 40
    assert np.array_equal(evaluation.predictions["target"], batch["target"].numpy())


def test_fewer_than_five_classes(batch):
    task = Classify(Pixels(3))
    small = {**batch, "image": batch["image"][:, :, :1], "target": batch["target"] % 3}
    assert task.evaluate([small], torch.device("cpu")).metrics["top5"] == 1.0


def test_nothing_to_evaluate_on():
    with pytest.raises(ValueError, match="there are no images to evaluate on"):
        Classify(Pixels()).evaluate([], torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["a", "b"]}, "the model has 6 classes, the data have 2"),
        ({"config": ClassifyConfig(loss="bse")}, "unknown task.loss 'bse'; allowed are cross_entropy and bce"),
        ({"config": ClassifyConfig(smoothing=1.0)}, r"task.smoothing 1.0 is not in \[0, 1\)"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Classify(Pixels(), **arguments)
