"""The gradient of a loss that needs all answers of a window at once, with the memory of one micro-batch.

First every token's log-probability, without a graph; then the loss of the whole window, and its gradient with respect
to these few numbers; then each micro-batch once more, with a graph, to carry its share of that gradient to the weights.
By the chain rule that is the gradient of the window in one graph, whatever the micro-batches. The last micro-batch has
its graph from the first time: a window of n costs n - 1 forward passes more than a loss that needs no window.

Source: gradient caching, arXiv:2101.06983, there for contrastive losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phi2.data.encode import EncodedPreference
from phi2.losses.batch import AnswerBatch
from phi2.model import Phi2ForCausalLM
from phi2.training.config import DPOConfig
from phi2.training.optim import Optimizer
from phi2.training.precision import autocast
from phi2.training.reference_cache import Reference
from phi2.training.scoring import answer_batch, both_logps


def backward_of_window(
    config: DPOConfig,
    model: Phi2ForCausalLM,
    optimizer: Optimizer,
    batches: Sequence[Sequence[EncodedPreference]],
    reference: Reference | None,
    losses_of: Callable[[AnswerBatch], tuple[Tensor, dict[str, float]]],
) -> tuple[AnswerBatch, Tensor, dict[str, float]]:
    """Adds the gradient of the mean loss of a window; returns its answers and what `losses_of` made of them.

    Args:
        batches: the window.
        losses_of: (P,) losses of its P rows, and the state of the loss behind them.
    """
    rewinds, policy, ref = [], [], []
    for index, batch in enumerate(batches):
        rewinds.append(rewind_of(model.device))
        with torch.set_grad_enabled(index == len(batches) - 1):
            logps, ref_logps = both_logps(model, batch, reference, autocast(config))
        policy.append(logps)  # (N,)
        ref += [] if ref_logps is None else [ref_logps]
    end = rewind_of(model.device)

    leaves = torch.cat(policy).detach().requires_grad_()
    answers = answer_batch([row for batch in batches for row in batch], leaves, torch.cat(ref) if ref else None)
    losses, after = losses_of(answers)
    (gradient,) = torch.autograd.grad(losses.mean(), leaves)

    *others, last = gradient.split([len(logps) for logps in policy])
    optimizer.backward(policy[-1] @ last)  # d(logps @ g) = g d(logps)
    for batch, rewind, share in zip(batches, rewinds, others, strict=False):  # the last has had its turn
        rewind()  # the same dropout as the first time
        logps, _ = both_logps(model, batch, None, autocast(config))
        optimizer.backward(logps @ share)
    end()
    return answers, losses, after


def rewind_of(device: torch.device) -> Callable[[], None]:
    """What puts torch's random generators, the CPU's and the device's, back to where they are now."""
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return rewind
