"""Losses of a whole window: what a pair is worth depends on the other pairs of the update, or on the updates before.

Each is given all pairs of an update at once, whatever the passes (`training/two_phases.py`), and returns a value
for each, whose mean is minimised. Running numbers move by M <- 0.9 M + 0.1 m before they are used; as in the authors'
code they start at 0, without a correction for that.

Symbols are those of `logistic.py`; B = pairs of the window, sg = a number without gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.arriving import without_wait
from phi2.losses.batch import PairBatch
from phi2.losses.logistic import smoothed
from phi2.losses.registry import State, preference_loss

DECAY = 0.9  # of running means
LOWEST_BETA = 1e-3  # of beta_dpo, as in its authors' code
NOISE = 1e-3  # nats a token: deviations below it are rounding, and are divided by as if they were that


@preference_loss("aot", scope="window")
def aot(pairs: PairBatch, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT on pairs: -(1-e) log sigma(z) - e log sigma(-z), z = beta (sort(s_w - s_l) - sort(r_w - r_l)).

    Sorted over the window: the policy's differences are compared with the reference's rank by rank, so a value belongs
    to a rank. trl sorts a micro-batch: with one pair in it, its `aot` is cDPO.

    Source: arXiv:2406.05882, as in trl.
    """
    policy, ref = pairs.policy_chosen - pairs.policy_rejected, pairs.ref_chosen - pairs.ref_rejected
    return smoothed(beta * (policy.sort().values - ref.sort().values), label_smoothing)


@preference_loss("aot_unpaired", scope="window")
def aot_unpaired(pairs: PairBatch, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT on unpaired answers: -(1-e) log sigma(z) - e log sigma(-z), z = beta (sort(l_w) - sort(l_l)).

    Sorted over the window, as in `aot`; trl sorts a micro-batch.

    Source: arXiv:2406.05882, as in trl.
    """
    chosen, rejected = pairs.chosen_logratio.sort().values, pairs.rejected_logratio.sort().values
    return smoothed(beta * (chosen - rejected), label_smoothing)


@preference_loss("dr_dpo", scope="window")
def dr_dpo(pairs: PairBatch, *, beta: float = 0.1, beta_prime: float = 1.0) -> Tensor:
    """Dr. DPO: -b log mean(e^(-L/b)) over the window, L = -log sigma(beta (l_w - l_l)), b = beta_prime.

    Pairs whose L is high, which may be labelled wrongly, count less; all pairs have the same value. The authors take
    the mean over a micro-batch, and may smooth the labels of L.

    Source: arXiv:2407.07880; junkangwu/Dr_DPO trainers.py, where b is mode_weight.
    """
    tempered = F.logsigmoid(beta * pairs.margin) / beta_prime  # -L / b
    return (-beta_prime * (tempered.logsumexp(dim=0) - math.log(len(tempered)))).expand(len(tempered))


@preference_loss("beta_dpo", scope="window", state={"mean": 0.0, "deviation": 0.0, "updates": 0})
def beta_dpo(
    pairs: PairBatch, state: State, *, beta: float = 0.1, a: float = 0.6, drop: float = 0.2, drop_seed: float = 0
) -> tuple[Tensor, State]:
    """beta-DPO: -log sigma(b (l_w - l_l)) over the pairs that are kept, b = beta (1 + a (mean(l_w - l_l) - M)), sg, at
    least 1e-3, M = running mean of the margins.

    A share `drop` of the window is left out: B (1 - drop) pairs, one at least, are drawn without replacement by weights
    exp(-((l_w - l_l - M) / S)^2 / 2), S = running deviation. The draw is a function of drop_seed, of the number of
    updates before and of the margins, where the authors' takes torch's generator.

    Source: arXiv:2407.08639; junkangwu/beta-DPO trainers.py, where drop is mode_weight.
    """
    margin = pairs.margin.detach()
    mean, deviation = running(state["mean"], margin.mean()), running(state["deviation"], deviation_of(margin))
    log_weights = -(((margin - mean) / deviation.clamp(min=NOISE)) ** 2) / 2
    kept = drawn(margin, log_weights, drop, int(drop_seed + state["updates"]))
    adapted = (beta * (1 + a * ((margin * kept).sum() / kept.sum() - mean))).clamp(min=LOWEST_BETA)
    share = kept / kept.to(margin.dtype).mean()  # 0 of a pair that is dropped; its mean is 1
    after = {"mean": mean, "deviation": deviation, "updates": state["updates"] + 1}
    return -share * F.logsigmoid(adapted * pairs.margin), after


@preference_loss("alphadpo", scope="window", state={"mean": 0.0, "deviation": 0.0})
def alphadpo(
    pairs: PairBatch, state: State, *, beta: float = 2.5, gamma: float = 1.0, alpha: float = 0.1
) -> tuple[Tensor, State]:
    """alpha-DPO: -log sigma(beta (s_w/n_w - s_l/n_l - alpha z) - gamma), z = (l_w/n_w - l_l/n_l - M) / S, sg.

    M and S are the running mean and deviation of l_w/n_w - l_l/n_l: SimPO with a margin of its own for each pair. The
    authors' knob gamma_beta_ratio is gamma / beta. Where S is below 1e-3, as at the start, where both models agree, z
    is divided by that, so that it does not magnify rounding.

    Source: arXiv:2410.10148; junkangwu/alpha-DPO scripts/dpo_trainer.py.
    """
    margin = pairs.margin_per_token.detach()
    mean, deviation = running(state["mean"], margin.mean()), running(state["deviation"], deviation_of(margin))
    z = (margin - mean) / deviation.clamp(min=NOISE)
    policy = pairs.policy_chosen_per_token - pairs.policy_rejected_per_token
    return -F.logsigmoid(beta * (policy - alpha * z) - gamma), {"mean": mean, "deviation": deviation}


@preference_loss("amapo", reference_free=True, scope="window")
def amapo(pairs: PairBatch, *, beta: float = 2.0) -> Tensor:
    """AMaPO: -log sigma(beta (d - m)), d = s_w/n_w - s_l/n_l, m = e^(mean(d) (mean(d) - d) / std(d)) where d is below
    its mean in the window and 0 elsewhere, sg.

    A pair that ranks below the others gets a margin to win by. A deviation below 1e-3 is divided by as if it were that.

    Source: arXiv:2511.09385; Shiroha-Offical/AMaPO scripts/amapo_trainer.py.
    """
    policy = pairs.policy_chosen_per_token - pairs.policy_rejected_per_token
    mean, below = policy.detach().mean(), policy.detach().mean() - policy.detach()
    extra = (mean * below / deviation_of(policy.detach()).clamp(min=NOISE)).exp()
    return -F.logsigmoid(beta * (policy - extra * (below > 0)))


@preference_loss("bco", scope="window", state={"mean": 0.0, "answers": 0})
def bco(pairs: PairBatch, state: State, *, beta: float = 0.01) -> tuple[Tensor, State]:
    """BCO with its shift: -log sigma(beta l_w - d) - log sigma(-(beta l_l - d)), d = mean of beta l over all answers up
    to this update, sg.

    `bco_pair` is it with d = 0, as in trl 1.16. LLaMA-Factory has the shift as the mean of the means of micro-batches.

    Source: arXiv:2404.04656.
    """
    rewards = beta * torch.stack((pairs.chosen_logratio, pairs.rejected_logratio)).detach()  # (2, B)
    answers = state["answers"] + rewards.numel()
    shift = state["mean"] + (rewards.mean() - state["mean"]) * rewards.numel() / answers
    chosen, rejected = beta * pairs.chosen_logratio - shift, beta * pairs.rejected_logratio - shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected), {"mean": shift, "answers": answers}


@preference_loss("sft_tokens", reference_free=True, scope="window")
def sft_tokens(pairs: PairBatch) -> Tensor:
    """Likelihood of the chosen answers, token by token: -s_w / mean(n_w), a term for mixtures.

    Its mean is that over all chosen tokens of the window: trl's `sft`, whose mean is over those of a micro-batch.
    `--nll_weight` adds the same to any loss in one phase; `sft` counts each answer the same.

    Source: arXiv:2404.19733 (its likelihood term), as in trl.
    """
    return -pairs.policy_chosen / pairs.chosen_length.to(pairs.policy_chosen.dtype).mean()


@preference_loss("tpo", reference_free=True, scope="window", needs=("gold",))
def tpo(
    pairs: PairBatch,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    tpo_alpha: float = 1.0,
    contrast: Literal["sigmoid", "hinge", "ipo", "tpo_l"] = "sigmoid",
    tpo_l_gamma: float = 0.5,
) -> Tensor:
    """TPO: contrast(s_w, s_l) - tpo_alpha s_g / mean(n_g), g = an answer to be imitated, column `reference`.

    sigmoid: -(1-e) log sigma(z) - e log sigma(-z), z = beta (s_w - s_l), e = label_smoothing; hinge: max(0, 1 - z);
    ipo: (s_w/n_w - s_l/n_l - 1/(2 beta))^2; tpo_l: as sigmoid, z = beta (s_w/n_w - s_l/n_l) - tpo_l_gamma. The mean of
    the likelihood is that over all gold tokens of the window, in trl over those of a micro-batch.

    Source: arXiv:2405.16681, as in trl.
    """
    sums = pairs.policy_chosen - pairs.policy_rejected
    per_token = pairs.policy_chosen_per_token - pairs.policy_rejected_per_token
    values = {
        "sigmoid": lambda: smoothed(beta * sums, label_smoothing),
        "hinge": lambda: torch.relu(1 - beta * sums),
        "ipo": lambda: (per_token - 1 / (2 * beta)) ** 2,
        "tpo_l": lambda: smoothed(beta * per_token - tpo_l_gamma, label_smoothing),
    }[contrast]()
    return values - tpo_alpha * pairs.gold / pairs.gold_length.to(pairs.gold.dtype).mean()


def running(before: float | Tensor, value: Tensor) -> Tensor:
    """The running mean behind an update."""
    return DECAY * before + (1 - DECAY) * value


def deviation_of(values: Tensor) -> Tensor:
    """The unbiased standard deviation of a window; 0 of a single pair."""
    return values.std(correction=min(len(values) - 1, 1))


def drawn(values: Tensor, log_weights: Tensor, drop: float, seed: int) -> Tensor:
    """(B,) bool: the share 1 - drop of a window, one pair at least, drawn without replacement by weights.

    Args:
        values: (B,) the lowest gets the first lot and so on, so that the order of the pairs does not count.
        log_weights: (B,) float.
    Source: exponential races, Efraimidis and Spirakis 2006: the k lowest E / weight, E exponential, are such a draw.
    """
    count = max(1, int(len(log_weights) * (1 - drop)))
    lots = torch.empty(len(log_weights), dtype=torch.float64)
    lots.exponential_(generator=torch.Generator().manual_seed(seed))
    order = values.argsort()
    ahead = log_weights[order] - without_wait(lots.log().to(log_weights.dtype), log_weights.device)
    kept = torch.zeros_like(log_weights, dtype=torch.bool)
    kept[order[ahead.topk(count).indices]] = True
    return kept
