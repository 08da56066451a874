"""Task, optimiser, loss scaling and moving average: one update, and their state for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sparse_mlp.distributed import (
    MeshConfig,
    Parallel,
    broadcast,
    clip_gradients,
    create_mesh,
    full,
    gather,
    gradient_norm,
    own_part,
    parallelize,
    split_like,
)
from sparse_mlp.engine.batch import move_to_device, seed_torch, split_microbatches
from sparse_mlp.engine.checkpoint import join_tensors, split_tensors
from sparse_mlp.engine.config import OptimConfig, TrainConfig
from sparse_mlp.engine.optim import create_optimizer
from sparse_mlp.engine.task import Batch, Task, name_of
from sparse_mlp.errors import UserError
from sparse_mlp.moe import set_balance_scale
from sparse_mlp.moe.telemetry import moe_layers

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A task on its device with optimiser, loss scaling and moving average."""

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        train: TrainConfig,
        device: torch.device,
        mesh: MeshConfig | None = None,
    ) -> None:
        mesh = mesh or MeshConfig()
        self.train, self.device = train, device
        self.mesh = create_mesh(mesh, device)
        if self.mesh.is_split and train.amp == "fp16":
            raise UserError("train.amp fp16 scales each process's loss apart; with mesh.expert or mesh.shard use bf16")
        if self.mesh.shard and train.channels_last:
            raise UserError("train.channels_last does not go with mesh.shard: FSDP2 takes contiguous weights only")
        self.memory_format = torch.channels_last if train.channels_last else torch.contiguous_format
        self.task = task.to(device=device, memory_format=self.memory_format)  # type: ignore[call-overload]
        if train.grad_checkpointing:
            _checkpoint_activations(task.backbone())
        if train.compile:
            task.backbone().compile()
        self.ema: ModelEmaV3 | None = None
        if train.ema_decay is not None:  # copied before the weights are split
            plain = not self.mesh.is_split  # torch's operations on lists take plain tensors or split ones, not both
            self.ema = ModelEmaV3(self.task, decay=train.ema_decay, use_warmup=train.ema_warmup, foreach=plain)
            self._parallelize(self.ema.module.requires_grad_(False), mesh)
        self._moe_layers = len(moe_layers(task))
        self.parallel = self._parallelize(self.task, mesh)
        self.optimizer = create_optimizer(self.task, optim)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.amp == "fp16")
        self._balance_scale: float | None = None

    def _parallelize(self, task: Task, config: MeshConfig) -> Parallel:
        return parallelize(task, self.mesh, balance=config.balance, forwards=["evaluate"])

    def update(self, batch: Batch, step: int, steps: int, *, measure: bool) -> dict[str, Tensor]:
        """Update the weights from this rank's share of the global batch of `step`.

        `steps` is the length of the run, for `Task.before_step`. Returns the task's metrics, and the gradient's norm if
        it was clipped or `measure` is set. Only fp16 synchronises with the device: it skips steps that overflow.
        """
        batch = move_to_device(batch, self.device, self.memory_format)
        self.task.before_step(step, steps)
        values: dict[str, Tensor] = {}
        microbatches = split_microbatches(batch, self.train.grad_accum)
        for number, (microbatch, share) in enumerate(microbatches):
            seed_torch(self.device, self.train.seed, step, number)
            for name, value in self._accumulate(microbatch, share, last=number == len(microbatches) - 1).items():
                values[name] = values[name] + value if name in values else value
        self.parallel.finish()
        if self.train.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            values["grad_norm"] = clip_gradients(self.parameters, self.train.clip_grad)
        elif measure:
            self.scaler.unscale_(self.optimizer)
            values["grad_norm"] = gradient_norm(self.parameters)
        if measure:
            values |= {name: full(value) for name, value in self.task.gradient_metrics().items()}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.task, step=step + 1)
        return values

    def _accumulate(self, microbatch: Batch, share: float, *, last: bool) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch with `share` of the items; the last one reduces them over the ranks."""
        if self._moe_layers:  # the balance loss is not part of the loss that is scaled below
            self._scale_balance(self.scaler.get_scale() * share / self.task.model_passes)
        with self.parallel.reducing(last):
            with torch.autocast(self.device.type, _AMP.get(self.train.amp or ""), enabled=self.train.amp is not None):
                values = self.parallel.module(microbatch)
            self.scaler.scale(values["loss"] * share).backward()
        return {name: value.detach().float() * share for name, value in values.items()}

    def _scale_balance(self, scale: float) -> None:
        if scale != self._balance_scale:
            set_balance_scale(self.task, scale)
            self._balance_scale = scale

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Content of a checkpoint: the tensors in use by name, and numbers to store as JSON."""
        tensors = {f"task.{name}": tensor for name, tensor in self.task.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        optimizer = split_tensors(get_optimizer_state_dict(self.task, self.optimizer), "optimizer", tensors)
        return tensors, {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; `tensors` are those of `state`, with the stored values already in them."""
        optimizer = join_tensors(numbers["optimizer"], tensors)
        optimizer["param_groups"] = self._regroup(optimizer["param_groups"])
        set_optimizer_state_dict(self.task, self.optimizer, optim_state_dict=optimizer)
        self.scaler.load_state_dict(numbers["scaler"])
        self._balance_scale = None

    def _regroup(self, stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Stored options in the groups of this optimiser, which on another mesh are other parts of the same groups."""
        options = {name: group for group in stored for name in group["params"]}
        own = get_optimizer_state_dict(self.task, self.optimizer)["param_groups"]
        return [{**options[group["params"][0]], "params": group["params"]} for group in own]  # type: ignore[index]

    def begin_with(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Give the optimiser this state of the parameters of these names; the others begin without one."""
        numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        own = {
            numbers[id(p)]: {key: split_like(value, p) for key, value in state[name].items()}
            for name, p in self.task.named_parameters()
            if name in state
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": own})

    def not_finite(self) -> str | None:
        """Name of a weight, or averaged weight, that holds NaN or infinity. Collective; waits for the device."""
        named: list[tuple[str, Tensor]] = list(self.task.named_parameters())
        if self.ema is not None:
            named += [(f"the average of {name}", tensor) for name, tensor in self.ema.module.named_parameters()]
        finite = torch.stack([own_part(tensor).isfinite().all() for _, tensor in named])
        found = None if finite.all() else named[int(finite.int().argmin())][0]
        if not self.mesh.is_split:
            return found
        return next((name for name in broadcast(gather(found)) or () if name is not None), None)

    def weights(self) -> dict[str, dict[str, str]]:
        """Files of the bare model, for use outside training: names of tensors in the file -> in `state`."""
        backbone = self.task.backbone()
        prefix, names = f"{name_of(backbone, self.task)}.", list(backbone.state_dict())
        files = {"model.safetensors": {name: f"task.{prefix}{name}" for name in names}}
        if self.ema is not None:
            files["model_ema.safetensors"] = {name: f"ema.{prefix}{name}" for name in names}
        return files


def _checkpoint_activations(model: nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"train.grad_checkpointing is set, but {type(model).__name__} cannot do it")
    model.set_grad_checkpointing(True)  # type: ignore[operator]
