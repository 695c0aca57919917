"""What a loss may ask of the whole distribution at each token of an answer, beside the token's log-probability.

Logits are never held for all tokens at once; of the KL, whose gradient is wanted, they are made again for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phi2.data.encoded import EncodedPreference
from phi2.inference.scoring import logits_of
from phi2.losses.head import predicting_states
from phi2.losses.registry import EXTRAS
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow

Asked = Callable[[], AbstractContextManager[Phi2ForCausalLM]]  # within, the model that it yields is the reference
LOGITS = 2**26  # numbers that are held at a time
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {  # of (n, V) log-probabilities
    "entropy": lambda logps: -(logps.exp() * logps).sum(dim=-1),
    "log_sum_square": lambda logps: (2 * logps).logsumexp(dim=-1),
}
assert STATISTICS.keys() | {"kl"} == set(EXTRAS)


@runtime_checkable
class AskedReference(Protocol):
    """A reference that is asked during training, for more than log-probabilities too."""

    asked: Asked

    def __call__(self, rows: Sequence[EncodedPreference], row: TokenRow) -> Tensor: ...


@torch.no_grad()
def token_statistics(model: Phi2ForCausalLM, hidden: Tensor, row: TokenRow, names: Sequence[str]) -> dict[str, Tensor]:
    """(N,) float32 of each statistic, where each target of a row is predicted; some rows of logits at a time.

    Args:
        hidden: (1, T, C) from `model.model(...)`.
        names: of `EXTRAS`.
    """
    wanted = [name for name in names if name in STATISTICS]
    if not wanted:
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for part in _picked(model, hidden, row):
        logps = logits_of(model, part).log_softmax(dim=-1)
        for name in wanted:
            found[name].append(STATISTICS[name](logps))
    return {name: torch.cat(parts) for name, parts in found.items()}


def kl_to_policy(model: Phi2ForCausalLM, hidden: Tensor, row: TokenRow, asked: Asked, ref_hidden: Tensor) -> Tensor:
    """(N,) float32 KL(reference to policy) over all ids where each target of a row is predicted, with its gradient.

    Args:
        asked: the reference, for its head.
        hidden, ref_hidden: (1, T, C) of policy and reference.
    """

    def part(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad(), asked() as reference:
            ref = reference.lm_head(other).float().log_softmax(dim=-1)  # (n, V)
        policy = model.lm_head(own).float().log_softmax(dim=-1)
        return (ref.exp() * (ref - policy)).sum(dim=-1)

    parts = zip(_picked(model, hidden, row), _picked(model, ref_hidden, row), strict=True)
    return torch.cat([checkpoint(part, own, other, use_reentrant=False) for own, other in parts])


def _picked(model: Phi2ForCausalLM, hidden: Tensor, row: TokenRow) -> Sequence[Tensor]:
    """The (N, C) hidden states that predict targets, some at a time."""
    return predicting_states(hidden, row.logits_indices).split(max(1, LOGITS // model.config.vocab_size))
