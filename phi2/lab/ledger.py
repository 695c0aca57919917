"""Questions to a ledger: where a margin sits, which pairs flipped, which labels look wrong, which pairs are ties.

Every function takes an `Evaluation` (`phi2/runs/ledger.py`) and answers for each of its pairs, (pairs,). Of an answer
with a label, which stands alone, what compares two answers is NaN, or not so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from phi2.runs.ledger import COLUMN, SIDES, Evaluation

CONFIDENT, TIE = 0.5, 0.02  # nats a token: from where on a model prefers an answer clearly, and up to where hardly
MOST_GROUPS = 12  # values of a column that a table is made by
BINS = 4  # of lengths, with as many pairs each


def has_reference(found: Evaluation) -> bool:
    return "r_w" in found or "r_l" in found


def has_pairs(found: Evaluation) -> bool:
    """Whether any row compares two answers; else all hold one with a label."""
    return "margin" in found


def has_single_answers(found: Evaluation) -> bool:
    """Whether any row holds an answer with a label, alone."""
    return "margin" not in found or found.table["margin"].null_count > 0


def rows_of(found: Evaluation) -> str:
    """What its rows are called."""
    if not has_pairs(found):
        return "answers"
    return "rows" if has_single_answers(found) else "pairs"


def gains(found: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """s - r of the chosen and of the rejected answer, nats: how far they moved; without a reference s."""
    s_w, s_l = found["s_w"], found["s_l"]
    return (s_w - found["r_w"], s_l - found["r_l"]) if has_reference(found) else (s_w, s_l)


def lead(found: Evaluation) -> np.ndarray:
    """How far it went the right way, nats: a pair's margin, what a good answer gained, and what a bad one lost."""
    chosen, rejected = map(np.nan_to_num, gains(found))
    return chosen - rejected


def length_margin(found: Evaluation) -> np.ndarray:
    """What the margin would be if every token of both answers had gained alike, nats: their lengths' part of it."""
    n_w, n_l = found["n_w"], found["n_l"]
    return sum(gains(found)) / (n_w + n_l) * (n_w - n_l)


def preference(found: Evaluation, model: str = "policy") -> np.ndarray:
    """By how much a model likes the chosen answer better than the rejected one, in nats per token.

    Args:
        model: policy or reference.
    """
    w, l = ("s_w", "s_l") if model == "policy" else ("r_w", "r_l")  # noqa: E741
    return found[w] / found["n_w"] - found[l] / found["n_l"]


def learnt(found: Evaluation) -> np.ndarray:
    """Whether a pair is ranked right that was not at the evaluation before."""
    return _is(found, "correct", True) & _is(found, "was_correct", False)


def lost(found: Evaluation) -> np.ndarray:
    """Whether a pair is ranked wrong that was not at the evaluation before."""
    return _is(found, "correct", False) & _is(found, "was_correct", True)


def _is(found: Evaluation, column: str, wanted: bool) -> np.ndarray:
    return np.array([value is wanted for value in found[column].tolist()])


def suspects(found: Evaluation) -> np.ndarray:
    """Whether the policy or the reference clearly prefers the rejected answer: the label may be wrong."""
    return doubt(found) > CONFIDENT


def doubt(found: Evaluation) -> np.ndarray:
    """By how much the model that likes the rejected answer most likes it better, nats per token."""
    models = ("policy", "reference") if has_reference(found) else ("policy",)
    return np.max([-preference(found, model) for model in models], axis=0)


def contradicted(found: Evaluation) -> np.ndarray:
    """Whether the same answers stand elsewhere the other way round, or with the other label: one of both is wrong."""
    pairs = _texts(found)
    known = set(pairs)
    return np.array([(prompt, rejected, chosen) in known for prompt, chosen, rejected in pairs])


def repeated(found: Evaluation) -> np.ndarray:
    """Whether the same pair stands there more than once."""
    counts = Counter(_texts(found))
    return np.array([counts[pair] > 1 for pair in _texts(found)])


def ties(found: Evaluation) -> np.ndarray:
    """Whether the policy hardly prefers either answer."""
    return np.abs(preference(found)) < TIE


def readable(text: str) -> str:
    """A text without the markers of its turns."""
    return re.sub(r"<\|\w+\|>\n?", "", text).strip()


def _texts(found: Evaluation) -> list[tuple[str, str, str]]:
    return list(zip(*(found[part] for part in ("prompt", *SIDES)), strict=True))


QUERIES: dict[str, tuple[Callable[[Evaluation], np.ndarray], Callable[[Evaluation], np.ndarray]]] = {
    # what a pair is called -> whether it is one, and what the first of them has most of
    "lost": (lost, lambda found: -lead(found)),
    "learnt": (learnt, lead),
    "suspected label noise": (suspects, doubt),
    "contradicted": (contradicted, doubt),
    "near-ties": (ties, lambda found: -np.abs(preference(found))),
    "repeated": (repeated, doubt),
}
OF_PAIRS = ("suspected label noise", "near-ties")  # what is asked of two answers only


def groups(found: Evaluation) -> dict[str, np.ndarray]:
    """By name (pairs,) which belong to it: those of a file, with a text in a column that has few, or of a length."""
    by = {"file": found["file"]}
    texts = (name for name in found.columns if found[f"{COLUMN}{name}"].dtype == object)
    by |= {name: np.array([str(value) for value in found[f"{COLUMN}{name}"]]) for name in texts}
    few = {name: values for name, values in by.items() if 2 <= len(set(values)) <= MOST_GROUPS}
    named = {f"{name}: {value}": values == value for name, values in few.items() for value in sorted(set(values))}
    return named | {f"{tokens} tokens": mask for tokens, mask in length_bins(found).items()}


def length_bins(found: Evaluation) -> dict[str, np.ndarray]:
    """Quarters of the pairs by the tokens of their answers; fewer where many are of the same length."""
    tokens = np.nan_to_num(found["n_w"]) + np.nan_to_num(found["n_l"])
    ends = np.unique(np.quantile(tokens, np.arange(1, BINS + 1) / BINS, method="inverted_cdf"))
    edges = [int(tokens.min()) - 1, *map(int, ends)]
    bins = {(low + 1, high): (tokens > low) & (tokens <= high) for low, high in pairwise(edges)}
    return {f"{low} to {high}" if low < high else f"{low}": mask for (low, high), mask in bins.items()}
