"""What a preference run reports, over all pairs of a window or data set, not over its last micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phi2.losses.batch import PairBatch


@torch.no_grad()
def pair_metrics(pairs: PairBatch, losses: Tensor, reward_scale: float) -> dict[str, Tensor]:
    """One value per pair, (B,), of everything that is reported.

    Rewards are the log-ratio to the reference, times their scale; without one, the log-probability per token. What a
    modifier makes of these for its loss does not count here, as in trl. `kl` estimates KL(reference to policy) per
    token as the mean of log ref - log policy over the chosen answers: exact in expectation if they were the reference's
    own samples, and never exploding, as estimators of the other direction do.

    Args:
        losses: (B,) of the same pairs.
        reward_scale: that of the loss (`BoundLoss`).
    Source: metric names as in trl.
    """
    if pairs.ref_chosen_logps is None:
        chosen = reward_scale * pairs.policy_chosen / pairs.chosen_length
        rejected = reward_scale * pairs.policy_rejected / pairs.rejected_length
        reference = {}
    else:
        chosen, rejected = reward_scale * pairs.chosen_logratio, reward_scale * pairs.rejected_logratio
        reference = {
            "ref_logps/chosen": pairs.ref_chosen,
            "ref_logps/rejected": pairs.ref_rejected,
            "kl": -pairs.chosen_logratio / pairs.chosen_length,
        }
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


def means(gathered: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean over the pairs of all micro-batches."""
    return {name: torch.cat([part[name].detach() for part in gathered]).mean().item() for name in gathered[0]}
