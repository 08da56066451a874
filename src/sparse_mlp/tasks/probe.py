"""The linear probe: a classifier on the features of a frozen backbone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_mlp.distributed import full
from sparse_mlp.engine import Batch, Evaluation
from sparse_mlp.errors import UserError
from sparse_mlp.tasks.classify import Classify, ClassifyConfig
from sparse_mlp.tasks.features import pooled_features

_INIT_STD = 0.01  # of the classifier's weights, as MoCo v3 has it


class Probe(Classify):
    """Trains the classifier of a timm model on the pooled features of its backbone (MoCo v3, section 4.2).

    The backbone is frozen and in evaluation mode throughout, so that norms, drop path and routers behave as in
    inference. Its digest is a buffer: every evaluation asserts that no bit has changed since the run began, also after
    a resumption.
    """

    digest: Tensor

    def __init__(
        self, model: nn.Module, config: ClassifyConfig | None = None, *, class_names: Sequence[str] | None = None
    ) -> None:
        """Reinitialises the classifier. UserError as in `Classify`, or if it is not one linear layer."""
        super().__init__(model, config, class_names=class_names)
        head = model.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise UserError(f"a linear probe needs one linear layer; {type(model).__name__} ends in {head}")
        model.requires_grad_(False)
        head.requires_grad_(True)
        nn.init.normal_(head.weight, std=_INIT_STD)
        nn.init.zeros_(head.bias)
        self.head_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.fixed = [name for name in model.state_dict() if name not in self.head_names]
        self.register_buffer("digest", torch.tensor(backbone_digest(model, self.fixed)))
        self.train(self.training)

    def train(self, mode: bool = True) -> Probe:
        """Sets the mode of the task only; the model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            features = pooled_features(self.model, batch["image"])
        return self.score(self.model.get_classifier()(features), batch["target"])  # type: ignore[operator]

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        """The classifier's weight and bias, both with the weight decay. UserError for a layer decay."""
        if layer_decay is not None:
            raise UserError(f"optim.layer_decay {layer_decay} would be ignored: only the classifier is trained")
        head = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": head, "weight_decay": weight_decay}]

    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        now = backbone_digest(self.model, self.fixed)
        assert now == int(self.digest), "the backbone of a probe has changed"
        return super().evaluate(loader, device)


def backbone_digest(model: nn.Module, names: Iterable[str]) -> int:
    """A 63-bit digest of parameters and buffers of a model, by name and value; collective where they are split."""
    # not of state_dict, which takes weights that FSDP2 has gathered for a forward away again
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    tensors = dict(itertools.chain(parameters, buffers))
    found = hashlib.blake2b(digest_size=8)
    for name in names:
        found.update(name.encode())
        value = full(tensors[name].detach()).to("cpu", copy=True)  # FSDP2 frees what numpy would hold on to
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(found.digest(), "little") >> 1
