"""One pass over pairs, for a loop of one's own: what a preference loss looks at, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

from phi2.data.encode import EncodedPair
from phi2.losses.batch import PairBatch
from phi2.model import Phi2ForCausalLM
from phi2.training import pairs as pair_passes
from phi2.training.reference import adapters_off, another_model, require_fit
from phi2.training.reference_cache import Reference


def score_pairs(
    model: Phi2ForCausalLM,
    pairs: Sequence[EncodedPair],
    reference: Phi2ForCausalLM | Literal["adapters_off"] | None = None,
) -> PairBatch:
    """Log-probabilities of both answers of B pairs, token by token, as a preference loss takes them.

    All pairs are read in one row, each prompt once for both of its answers. The policy's numbers have a gradient with
    respect to whatever of it trains; the reference's have none. The policy drops out where it is in training mode.

    >>> import phi2
    >>> model, tokenizer = phi2.load("nano-instruct", device="cpu")
    >>> rows, _ = phi2.load_data(tokenizer, [{"source": "toy-dpo", "rows": 4}])
    >>> phi2.attach(model, phi2.LoraConfig(r=4))  # a fresh adapter changes nothing yet
    >>> pairs = phi2.score_pairs(model, rows, reference="adapters_off")
    >>> pairs.policy_chosen_logps.shape == pairs.chosen_mask.shape  # (B, tokens of the longest chosen answer), nats
    True
    >>> phi2.bind_loss("sigmoid", {"beta": 0.1})(pairs).detach()  # (B,) nats
    tensor([0.6931, 0.6931, 0.6931, 0.6931])

    Args:
        model: the policy.
        pairs: B rows of `phi2.load_data`.
        reference: a model, or "adapters_off" for the policy without its adapter; None for a loss without reference.
    Returns:
        A `PairBatch`: float32 log-probabilities in nats.
    Raises:
        ValueError: for no pairs, rows that are none or that a model cannot read, or a policy without adapter.
    """
    if not pairs or not all(isinstance(pair, EncodedPair) for pair in pairs):
        got = next((type(pair).__name__ for pair in pairs if not isinstance(pair, EncodedPair)), "none")
        raise ValueError(f"pairs must be preference rows of load_data, one at least, got {got}")
    require_fit("the policy", model.config, pairs)
    return pair_passes.score_pairs(model, [pairs], _reference(model, reference, pairs), nullcontext)


def _reference(
    model: Phi2ForCausalLM, reference: Phi2ForCausalLM | str | None, pairs: Sequence[EncodedPair]
) -> Reference | None:
    if reference is None:
        return None
    if isinstance(reference, Phi2ForCausalLM):
        require_fit("the reference", reference.config, pairs)
        return another_model(reference)
    if reference != "adapters_off":
        raise ValueError(f"reference must be a model, 'adapters_off' or None, got {reference!r}")
    return adapters_off(model)
