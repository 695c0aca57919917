"""From hidden states to the log-probabilities a loss needs, with the head applied only where there is a target."""

from __future__ import annotations

import torch
from torch import Tensor

from phi2.lora import LoraLinear
from phi2.model import Phi2ForCausalLM
from phi2_kernels.linear_logprob import linear_logprob


def target_logps(
    model: Phi2ForCausalLM, hidden: Tensor, rows: Tensor, targets: Tensor, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token under the model's head, LoRA on it included.

    Args:
        model: gives the head.
        hidden: (B, T, C) from `model.model(...)`.
        rows: (N,) which of the B*T hidden states predicts each target.
        targets: (N,) token ids.
        entropy: also return each prediction's entropy, without gradient.
    Returns:
        (N,) float32 in nats, and (N,) entropies in nats or None.
    """
    picked = hidden.flatten(0, 1).index_select(0, rows)  # (N, C)
    head = model.lm_head
    weight, bias, adapter = head.weight, head.bias, (None, None)
    if isinstance(head, LoraLinear) and head.enabled:
        adapter = (head.lora_hidden(picked) * head.scaling, head.lora_B.weight)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        picked, weight = picked.to(dtype), weight.to(dtype)
    return linear_logprob(picked, weight, bias, targets, *adapter, entropy=entropy)
