"""What a loss may ask of the whole distribution at each token of an answer, beside the token's log-probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phi2.inference.scoring import logits_of
from phi2.losses.registry import EXTRAS
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow

LOGITS = 2**26  # numbers that are held at a time
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {  # of (n, V) log-probabilities
    "entropy": lambda logps: -(logps.exp() * logps).sum(dim=-1),
    "log_sum_square": lambda logps: (2 * logps).logsumexp(dim=-1),
}
assert STATISTICS.keys() == set(EXTRAS)


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
    picked = hidden.flatten(0, 1).index_select(0, row.logits_indices)  # (N, C)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for part in picked.split(max(1, LOGITS // model.config.vocab_size)):
        logps = logits_of(model, part).log_softmax(dim=-1)
        for name in wanted:
            found[name].append(STATISTICS[name](logps))
    return {name: torch.cat(parts) for name, parts in found.items()}
