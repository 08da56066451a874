"""What experts begin as, given experts that are all copies of one MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.dense import read_mlp
from sparse_mlp.moe.experts import ExpertLinear, Experts
from sparse_mlp.moe.general_experts import GeneralExperts

MOST_ITEMS = 20_000  # that are clustered


class Seen(NamedTuple):
    """What an MLP got of some images: its inputs (N, D), and the mean size of its hidden values (H,)."""

    items: Tensor
    activation: Tensor


def watch(model: nn.Module, mlps: Mapping[str, nn.Module], images: Tensor) -> dict[int, Seen]:
    """Run the model on images and note what its MLPs get, by their id."""
    items: dict[int, list[Tensor]] = {}
    hidden: dict[int, list[Tensor]] = {}
    hooks = []
    for mlp in {id(mlp): mlp for mlp in mlps.values()}.values():
        last = mlp.get_submodule(read_mlp(mlp).fc2)
        for module, found in ((mlp, items), (last, hidden)):
            rows = found.setdefault(id(mlp), [])
            first = isinstance(last, nn.Conv2d)
            hooks.append(module.register_forward_pre_hook(lambda _, args, r=rows, f=first: r.append(_rows(args[0], f))))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {key: Seen(torch.cat(items[key]), torch.cat(hidden[key]).abs().mean(0)) for key in items}


def add_noise(layer: MoeMlp, strength: float, _: Seen | None) -> None:
    """Noise of `strength` times each weight's standard deviation, tried and found of no use in Sparse Upcycling,
    appendix B; other systems have it."""
    for linear in _linears(layer):
        linear.weight.add_(strength * linear.weight[0].std() * torch.randn_like(linear.weight))


def redraw_neurons(layer: MoeMlp, strength: float, _: Seen | None) -> None:
    """A share of each expert's hidden neurons from a normal distribution with mean and standard deviation of the
    weights that they replace, the same neurons in every matrix (Drop-Upcycling, Nakamura et al. 2025, section 3)."""
    hidden_dim = layer.experts.fc2.weight.shape[1]
    for first, last in zip(layer.experts.fc1.weight, layer.experts.fc2.weight, strict=True):
        chosen = torch.randperm(hidden_dim, device=last.device)[: max(1, round(strength * hidden_dim))]
        halves = first.split(hidden_dim, dim=1)  # two where the experts are gated
        for part in (*(half.t() for half in halves), last):
            part[chosen] = part[chosen].std() * torch.randn_like(part[chosen]) + part[chosen].mean()


def sample_neurons(layer: MoeMlp, strength: float, seen: Seen | None) -> None:
    """Narrower experts: a share of the hidden neurons, drawn without replacement for each (MoE Jetpack, Zhu et al.
    2024, section 3.1)."""
    if isinstance(layer.experts, GeneralExperts) and list(layer.experts.norm.parameters()):
        raise UserError('init="sample" draws hidden neurons, whose norm all experts have in common')
    hidden_dim = layer.experts.fc2.weight.shape[1]
    weight = torch.ones(hidden_dim) if seen is None else seen.activation.float().cpu() + 1e-12
    for part in _parts(layer):
        count = part.fc2.weight.shape[0]
        chosen = torch.stack([torch.multinomial(weight, max(1, round(strength * hidden_dim))) for _ in range(count)])
        chosen = chosen.to(part.fc2.weight.device)
        columns = torch.cat([chosen + i for i in range(0, part.fc1.weight.shape[2], hidden_dim)], 1)
        part.fc1.weight = _taken(part.fc1.weight, columns, 2)
        part.fc2.weight = _taken(part.fc2.weight, chosen, 1)
        if part.fc1.bias is not None:
            part.fc1.bias = _taken(part.fc1.bias, columns, 1)
    layer.origin = None


def draw_anew(layer: MoeMlp, *_: object) -> None:
    """Weights as of a new layer, for training from scratch."""
    for linear in _linears(layer):
        linear.reset_parameters()


def centroids(items_ND: Tensor, num_experts: int) -> Tensor:
    """Unit centroids of items by spherical k-means, one an expert, as rows of a router (Cluster-aware upcycling,
    arXiv 2604.13508, section 3). (N, D) -> (E, D)."""
    from sklearn.cluster import KMeans  # slow to import

    some = items_ND[torch.randperm(len(items_ND), device=items_ND.device)[:MOST_ITEMS]].float()
    if len(some) < num_experts:
        raise UserError(f"{num_experts} centroids need as many items; the images give {len(some)}")
    seed = int(torch.randint(2**31, ()))
    found = KMeans(num_experts, n_init=1, random_state=seed).fit(F.normalize(some, dim=1).cpu().numpy())
    return F.normalize(torch.as_tensor(found.cluster_centers_), dim=1).to(items_ND)


def _parts(layer: MoeMlp) -> list[Experts | GeneralExperts]:
    return [layer.experts] if layer.shared is None else [layer.experts, layer.shared]


def _linears(layer: MoeMlp) -> list[ExpertLinear]:
    return [linear for part in _parts(layer) for linear in (part.fc1, part.fc2)]


def _taken(values: Tensor, index_En: Tensor, dim: int) -> nn.Parameter:
    """Of each expert the entries of its own index along a dimension."""
    taken = torch.stack([value.index_select(dim - 1, i) for value, i in zip(values, index_En, strict=True)])
    return nn.Parameter(taken, values.requires_grad)


def _rows(x: Tensor, channels_first: bool) -> Tensor:
    return (x.movedim(1, -1) if channels_first else x).flatten(0, -2)
