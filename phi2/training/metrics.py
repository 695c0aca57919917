"""What a preference run reports, over all pairs of a window or data set, not over its last micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phi2.losses.preference import PairBatch


@torch.no_grad()
def pair_metrics(pairs: PairBatch, losses: Tensor, beta: float) -> dict[str, Tensor]:
    """One value per pair, (B,), of everything that is reported.

    Rewards are beta times the log-ratio to the reference; without one, beta times the log-probability per token. `kl`
    estimates KL(policy to reference) by the k3 estimator, the mean of exp(-l) - 1 + l over the answers' tokens. The
    answers are the data's, not the policy's own, so it says how far the policy moved on them.

    Args:
        losses: (B,) of the same pairs.
        beta: scale of the rewards.
    Source: metric names as in trl; k3 from joschu.net/blog/kl-approx.html.
    """
    if pairs.ref_chosen_logps is None:
        chosen = beta * pairs.policy_chosen / pairs.chosen_length
        rejected = beta * pairs.policy_rejected / pairs.rejected_length
        reference = {}
    else:
        chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
        reference = {"ref_logps/chosen": pairs.ref_chosen, "ref_logps/rejected": pairs.ref_rejected, "kl": _kl(pairs)}
    return {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": pairs.policy_chosen,
        "logps/rejected": pairs.policy_rejected,
        **reference,
        "length/chosen": pairs.chosen_mask.sum(dim=-1).float(),
        "length/rejected": pairs.rejected_mask.sum(dim=-1).float(),
    }


def _kl(pairs: PairBatch) -> Tensor:
    """(B,) mean over the tokens of both answers of exp(-l) - 1 + l, l the log-ratio of policy to reference."""
    chosen = pairs.policy_chosen_logps - pairs.ref_chosen_logps
    rejected = pairs.policy_rejected_logps - pairs.ref_rejected_logps
    tokens = pairs.chosen_mask.sum(dim=-1) + pairs.rejected_mask.sum(dim=-1)
    return sum((torch.expm1(-ratio) + ratio).sum(dim=-1) for ratio in (chosen, rejected)) / tokens


def means(gathered: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean over the pairs of all micro-batches."""
    return {name: torch.cat([part[name].detach() for part in gathered]).mean().item() for name in gathered[0]}
