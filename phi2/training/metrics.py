"""What a preference run reports, over all rows of a window or data set, not over its last pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phi2.arriving import Arriving
from phi2.losses.batch import AnswerBatch, PairBatch
from phi2.losses.bound import BoundLoss


@torch.no_grad()
def metrics_of(answers: AnswerBatch, losses: Tensor, loss: BoundLoss) -> dict[str, Tensor]:
    """Of everything that is reported the values whose mean it is, (P,), or fewer of what only some answers have.

    Args:
        losses: (P,) of these answers.
    """
    if all(part.unit == "answer" for part in loss.single):
        return {"loss": losses, **label_metrics(answers, loss.reward_scale)}
    metrics = pair_metrics(answers.pairs, loss.reward_scale)
    return {"loss": losses, **{name: answers.of_prompts(values, "pair") for name, values in metrics.items()}}


def label_metrics(answers: AnswerBatch, reward_scale: float) -> dict[str, Tensor]:
    """Of good answers and of bad ones, under the names of chosen and rejected ones; see `pair_metrics`.

    Where both are answers to one prompt, how they compare as well.

    Source: metric names as in trl's KTO trainer.
    """
    has_reference, (good, bad) = answers.ref_logps is not None, answers.by_label
    rewards = rewards_of(answers, reward_scale)
    values = {"rewards": rewards, "logps": answers.policy, "length": answers.length.float()}
    if has_reference:
        values["ref_logps"] = answers.ref
    sides = {"chosen": good, "rejected": bad}
    split = {f"{name}/{side}": each[places] for name, each in values.items() for side, places in sides.items()}
    margins = answers.gaps(rewards)
    compared = {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}
    return {**split, **compared, **({"kl": (-answers.logratio / answers.length)[good]} if has_reference else {})}


def rewards_of(answers: AnswerBatch, reward_scale: float) -> Tensor:
    """(A,) the log-ratio of each answer to the reference, times a scale; without one, its log-probability per token."""
    return reward_scale * (answers.policy_per_token if answers.ref_logps is None else answers.logratio)


def pair_metrics(pairs: PairBatch, reward_scale: float) -> dict[str, Tensor]:
    """One value per pair, (B,).

    Rewards are the log-ratio to the reference, times their scale; without one, the log-probability per token. What a
    modifier makes of these for its loss does not count here, as in trl. `kl` estimates KL(reference to policy) per
    token as the mean of log ref - log policy over the chosen answers: exact in expectation if they were the reference's
    own samples, and never exploding, as estimators of the other direction do.

    Args:
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


def means(gathered: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over the rows of all passes; what none of them has is left out."""
    joined = {name: torch.cat([part[name].detach() for part in gathered]) for name in gathered[0]}
    found = {name: values.mean() for name, values in joined.items() if len(values)}
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():  # of answers alone, which no margin is of
        found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
    return found


class Metrics:
    """What is reported of an update or an evaluation: numbers, some of which a GPU may have still to compute."""

    def __init__(self, values: Mapping[str, Tensor | float]) -> None:
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
        self._values, self._names = dict(values), [*tensors]
        self._numbers = Arriving(torch.stack([*tensors.values()]))

    def wait(self) -> dict[str, float]:
        found = dict(zip(self._names, self._numbers.wait(), strict=True))
        return {name: found.get(name, value) for name, value in self._values.items()}
