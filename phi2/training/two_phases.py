"""The gradient of a loss that needs all answers of a window at once, with the memory of one pass.

First every token's log-probability, without a graph; then the loss of the whole window, and its gradient with respect
to these few numbers; then each pass once more, with a graph, to carry its share of that gradient to the weights. By the
chain rule that is the gradient of the window in one graph, whatever the passes. The last pass has its graph from the
first time: a window of n costs n - 1 forward passes more than a loss that needs no window.

Source: gradient caching, arXiv:2101.06983, there for contrastive losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phi2.data.encoded import EncodedPreference
from phi2.losses.batch import AnswerBatch
from phi2.losses.registry import Need, State
from phi2.model import Phi2ForCausalLM
from phi2.training.config import DPOConfig
from phi2.training.optim import Optimizer
from phi2.training.passes import rewind_of
from phi2.training.precision import autocast
from phi2.training.reference_cache import Reference
from phi2.training.scoring import answer_batch, apart, joined, scored


def backward_of_window(
    config: DPOConfig,
    model: Phi2ForCausalLM,
    optimizer: Optimizer,
    rows: Sequence[EncodedPreference],
    passes: Sequence[Sequence[int]],
    reference: Reference | None,
    needs: Sequence[Need],
    losses_of: Callable[[AnswerBatch], tuple[Tensor, State]],
) -> tuple[AnswerBatch, Tensor, State]:
    """Adds the gradient of the mean loss of a window; returns its answers and what `losses_of` made of them.

    Args:
        rows: the window.
        passes: which of the rows each holds.
        needs: of the loss.
        losses_of: (P,) losses of its P rows, and the state of the loss behind them.
    """
    rewinds, parts = [], []
    for index, places in enumerate(passes):
        rewinds.append(rewind_of(model.device))
        with torch.set_grad_enabled(index == len(passes) - 1):
            parts.append(scored(model, rows, places, reference, autocast(config), needs))
    end = rewind_of(model.device)

    whole = joined(rows, passes, parts)
    leaves = whole.policy.detach().requires_grad_()  # (N,)
    answers = answer_batch(rows, whole._replace(policy=leaves))
    losses, after = losses_of(answers)
    (gradient,) = torch.autograd.grad(losses.mean(), leaves)

    *others, last = apart(rows, passes, gradient)
    optimizer.backward(parts[-1].policy @ last)  # d(logps @ g) = g d(logps)
    for places, rewind, share in zip(passes, rewinds, others, strict=False):  # the last has had its turn
        rewind()  # the same dropout as the first time
        optimizer.backward(scored(model, rows, places, None, autocast(config)).policy @ share)
    end()
    return answers, losses, after
