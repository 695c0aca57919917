"""The optimizer of a run: AdamW with a schedule, clipping and, in float16, loss scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from phi2.training.config import UpdateConfig


def schedule_factor(kind: str, step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at an update, counted from 0, as transformers defines it."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay; biases and LayerNorms do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    vectors = [p for p in trainable if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_updates(config: UpdateConfig, total_steps: int) -> int:
    """Updates of the warm-up: `warmup_steps`, or that share of all, rounded up.

    Raises:
        ValueError: when it outlasts the run, whose learning rate then never gets where it was set.
    """
    share = config.warmup_steps
    warmup = math.ceil(share * total_steps) if share < 1 else int(share)
    if warmup > total_steps:
        raise ValueError(f"warmup_steps {share:g} outlasts the run: it must be at most its {total_steps} updates")
    return warmup


class Optimizer:
    """One update at a time: `backward` for each pass, then `step`.

    Args:
        model: its trainable parameters are float32.
        total_steps: updates of the whole run, for the schedule.
        scale_loss: multiply the loss so that float16 gradients do not vanish.
    """

    def __init__(self, model: nn.Module, config: UpdateConfig, total_steps: int, scale_loss: bool) -> None:
        self.config, self.total_steps = config, total_steps
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale_loss)
        self.updates = 0
        self.warmup = warmup_updates(config, total_steps)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clear(self) -> None:
        """Forgets the gradients of an update that was not finished."""
        self.adamw.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        kind = self.config.lr_scheduler_type
        return self.config.learning_rate * schedule_factor(kind, self.updates, self.warmup, self.total_steps)

    def step(self) -> Tensor:
        """Clips, updates and clears the gradients; returns their norm before clipping, a number on the device.

        An update whose gradients are not finite leaves the weights and AdamW's moments as they are, and no device is
        waited for to know it. With a scaled loss it is, since an update that overflowed does not move the schedule.
        """
        self.scaler.unscale_(self.adamw)
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate
        norm = nn.utils.clip_grad_norm_(list(self.names), self.config.max_grad_norm or math.inf)
        if self.scaler.is_enabled():
            self.updates += self._step_scaled()
        else:
            # As a GradScaler tells it; AdamW reads it on the device.
            vars(self.adamw)["found_inf"] = (~norm.isfinite()).float()
            self.adamw.step()
            self.updates += 1
        self.clear()
        return norm

    def _step_scaled(self) -> bool:
        """Whether the gradients were finite; the scale follows."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.adamw)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's state of every trainable parameter, by "name.exp_avg" and so on."""
        return {
            f"{name}.{key}": value.contiguous()
            for parameter, name in self.names.items()
            for key, value in self.adamw.state[parameter].items()
        }

    def numbers(self) -> dict:
        """The rest of the state, as JSON takes it."""
        return {"updates": self.updates, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        """Takes back what `tensors` and `numbers` gave. Moments lie in memory as their parameter does, for AdamW."""
        for parameter, name in self.names.items():
            state = {"step": tensors[f"{name}.step"].to(parameter.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter).copy_(tensors[f"{name}.{key}"])
            self.adamw.state[parameter] = state
        self.updates = numbers["updates"]
        self.scaler.load_state_dict(numbers["scaler"])
