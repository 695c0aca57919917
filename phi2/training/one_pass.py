"""One pass over preference rows, for a loop of one's own: what a loss looks at, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

from phi2.data.encoded import EncodedPreference
from phi2.losses.batch import AnswerBatch
from phi2.losses.registry import Need
from phi2.model import Phi2ForCausalLM
from phi2.training.reference import adapters_off, another_model, require_fit
from phi2.training.reference_cache import Reference
from phi2.training.scoring import score_answers


def score_rows(
    model: Phi2ForCausalLM,
    rows: Sequence[EncodedPreference],
    reference: Phi2ForCausalLM | Literal["adapters_off"] | None = None,
    needs: Sequence[Need] = (),
) -> AnswerBatch:
    """Log-probabilities of all answers of P rows, token by token, as a preference loss takes them.

    All are read in one row of tokens, each prompt once for its answers. The policy's numbers have a gradient with
    respect to whatever of it trains; the reference's have none. The policy drops out where it is in training mode.

    >>> import phi2
    >>> model, tokenizer = phi2.load("nano-instruct", device="cpu")
    >>> rows, _ = phi2.load_data(tokenizer, [{"source": "toy-dpo", "rows": 4}])
    >>> phi2.attach(model, phi2.LoraConfig(r=4))  # a fresh adapter changes nothing yet
    >>> answers = phi2.score_rows(model, rows, reference="adapters_off")
    >>> answers.logratio.shape, answers.pairs.margin.shape  # of 8 answers, and of 4 pairs of them; nats
    (torch.Size([8]), torch.Size([4]))
    >>> phi2.bind_loss("sigmoid", {"beta": 0.1})(answers).detach()  # of 4 prompts, nats
    tensor([0.6931, 0.6931, 0.6931, 0.6931])

    Args:
        model: the policy.
        rows: preference rows of `phi2.load_data`.
        reference: a model, or "adapters_off" for the policy without its adapter; None for a loss without reference.
        needs: what the loss asks for besides, `BoundLoss.needs`: numbers of each token, and gold answers that the rows
            have. Answers behind other prompts are not made here.
    Returns:
        An `AnswerBatch`, whose `pairs` is the `PairBatch` that a loss of pairs is called with: float32, nats.
    Raises:
        ValueError: for no rows, others than these or such as a model cannot read, a policy without adapter, or needs
            that are none or that the rows do not have.
    """
    _require_rows(rows)
    _require_needs(needs, rows)
    require_fit("the policy", model.config, rows)
    if "mismatched" in needs or ("kl" in needs and reference is None):
        raise ValueError(f"needs: mismatched answers are not made here, and a kl needs a reference, got {[*needs]}")
    return score_answers(model, rows, _in_one, _reference(model, reference, rows), nullcontext, needs)


def _require_rows(rows: Any) -> None:
    is_one = isinstance(rows, EncodedPreference)
    other = None if is_one else next((row for row in rows if not isinstance(row, EncodedPreference)), None)
    if is_one or not rows or other is not None:
        got = "a row that is in no list" if is_one else "none" if other is None else type(other).__name__
        raise ValueError(f"rows must be preference rows of load_data, one at least, got {got}")


def _require_needs(needs: Any, rows: Sequence[EncodedPreference]) -> None:
    known = get_args(Need)
    if isinstance(needs, str) or not {*needs} <= {*known}:
        raise ValueError(f"needs must be a list of {', '.join(known)}, got {needs!r}")
    without = next((row for row in rows if not row.has_gold), None)
    if "gold" in needs and without is not None:
        raise ValueError(f"needs: {without.origin} has no answer to imitate (column reference)")


def _in_one(tokens: Sequence[int]) -> list[list[int]]:
    """All rows in one pass."""
    return [[*range(len(tokens))]]


def _reference(
    model: Phi2ForCausalLM, reference: Phi2ForCausalLM | str | None, rows: Sequence[EncodedPreference]
) -> Reference | None:
    if reference is None:
        return None
    if isinstance(reference, Phi2ForCausalLM):
        require_fit("the reference", reference.config, rows)
        return another_model(reference)
    if reference != "adapters_off":
        raise ValueError(f"reference must be a model, 'adapters_off' or None, got {reference!r}")
    return adapters_off(model)
