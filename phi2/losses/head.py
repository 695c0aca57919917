"""From hidden states to the log-probabilities a loss needs, with the head applied only where there is a target."""

from __future__ import annotations

import torch
from torch import Tensor

from phi2.called import must_be_called
from phi2.linear import PhiLinear
from phi2.lora import LoraLinear
from phi2.model import Phi2ForCausalLM
from phi2_kernels.linear_logprob import linear_logprob
from phi2_kernels.quantized_matmul import dense


def target_logps(
    model: Phi2ForCausalLM, hidden: Tensor, logits_indices: Tensor, targets: Tensor, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token under the model's head, LoRA on it included.

    Under autocast hidden states and weight are rounded to its dtype; what they make is float32 there too.

    Args:
        model: gives the head.
        hidden: (B, T, C) from `model.model(...)`.
        logits_indices: (N,) which of the B*T hidden states predicts each target.
        targets: (N,) token ids.
        entropy: also return each prediction's entropy, without gradient.
    Returns:
        (N,) float32 in nats, and (N,) entropies in nats or None.
    """
    return head_logps(model.lm_head, predicting_states(hidden, logits_indices), targets, entropy=entropy)


def predicting_states(hidden: Tensor, logits_indices: Tensor) -> Tensor:
    """(N, C) those of the hidden states (B, T, C) that predict targets; one that does so twice is there twice.

    Gradients of those add in a fixed order on a GPU too, where `index_select`'s do not.
    """
    return hidden.flatten(0, 1)[logits_indices]


def head_logps(
    head: PhiLinear, picked: Tensor, targets: Tensor, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`target_logps` of hidden states that were picked already, (N, C)."""
    if must_be_called([head]):
        return _called(head, picked, targets, entropy)
    form = (head.base if isinstance(head, LoraLinear) else head).form
    assert form is not None
    device, weight, adapter = picked.device.type, dense(form, picked.dtype), (None, None)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        picked, weight = picked.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):  # it would round the logits too
        if isinstance(head, LoraLinear) and head.adapter is not None:
            adapter = (head.adapter.hidden(picked), head.adapter.lora_B.weight)
        return linear_logprob(picked, weight, head.bias, targets, *adapter, entropy=entropy)


def _called(head: PhiLinear, picked: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """With all logits at once, by a head that has to be called."""
    logps = head(picked).float().log_softmax(dim=-1)  # (N, V)
    entropies = torch.special.entr(logps.detach().exp()).sum(dim=-1) if entropy else None
    return logps.gather(-1, targets[:, None])[:, 0], entropies
