"""Preference losses: each is one pure function from the log-probabilities of a batch of pairs to one loss per pair.

A loss receives a `PairBatch` and its own knobs, and returns (B,) losses in nats. Write yours in your own file, under
`@preference_loss("name")`, and `phi2 dpo --loss name --loss_file mine.py` trains on it: the name appears in the
choices of the command line, its keyword arguments are its knobs.

Symbols in the docstrings: s = sum of log pi(y|x) over the answer, r = the same under the reference, l = s - r,
n = tokens of the answer, w = chosen, l as index = rejected, sigma = logistic function.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Columns(dict[str, Tensor]):
    """(B,) float32 of each column that is a number in every row.

    Args:
        columns: those.
        gaps: of each other column, what is there in place of a number and in which row first. To ask for such a column
            is an error, also with `in` and `get`: whether it is there would depend on the rows at hand.
    """

    def __init__(self, columns: Mapping[str, Tensor] | None = None, gaps: Mapping[str, str] | None = None) -> None:
        super().__init__(columns or {})
        self.gaps = gaps or {}

    def __missing__(self, name: str) -> Tensor:
        gap = f"; {name!r} is not one: {self.gaps[name]}" if name in self.gaps else ""
        numbers = ", ".join(self) or "none"
        raise ValueError(f"the loss reads the column {name!r}; columns of numbers here are {numbers}{gap}")

    def __contains__(self, name: str) -> bool:
        if name in self.gaps:
            self.__missing__(name)
        return super().__contains__(name)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        return self[name] if name in self else default

    def each(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """The same columns with every tensor replaced by `function` of it."""
        return Columns({name: function(values) for name, values in self.items()}, self.gaps)


@dataclass(frozen=True)
class PairBatch:
    """Everything a preference loss may look at, token by token.

    Dims: B pairs, C and R the longest chosen and rejected answer.

    Attributes:
        policy_chosen_logps, ref_chosen_logps: (B, C) float32 in nats, 0 behind the end of an answer.
        policy_rejected_logps, ref_rejected_logps: (B, R) likewise. The ref ones are None in a reference-free run.
        chosen_mask, rejected_mask: bool of the same shapes, True at tokens of the answer.
        columns: (B,) float32 for each numeric column of the data set (score_chosen, weight, ...).
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    columns: Columns = field(default_factory=Columns)

    @cached_property
    def chosen_length(self) -> Tensor:
        """(B,) tokens of each chosen answer, at least 1."""
        return self.chosen_mask.sum(dim=-1).clamp(min=1)

    @cached_property
    def rejected_length(self) -> Tensor:
        """(B,) tokens of each rejected answer, at least 1."""
        return self.rejected_mask.sum(dim=-1).clamp(min=1)

    @cached_property
    def policy_chosen(self) -> Tensor:
        """s_w, (B,)."""
        return self.policy_chosen_logps.sum(dim=-1)

    @cached_property
    def policy_rejected(self) -> Tensor:
        """s_l, (B,)."""
        return self.policy_rejected_logps.sum(dim=-1)

    @cached_property
    def ref_chosen(self) -> Tensor:
        """r_w, (B,)."""
        return self._reference(self.ref_chosen_logps).sum(dim=-1)

    @cached_property
    def ref_rejected(self) -> Tensor:
        """r_l, (B,)."""
        return self._reference(self.ref_rejected_logps).sum(dim=-1)

    @cached_property
    def chosen_logratio(self) -> Tensor:
        """l_w = s_w - r_w, (B,)."""
        return self.policy_chosen - self.ref_chosen

    @cached_property
    def rejected_logratio(self) -> Tensor:
        """l_l = s_l - r_l, (B,)."""
        return self.policy_rejected - self.ref_rejected

    @cached_property
    def margin(self) -> Tensor:
        """l_w - l_l, (B,): what DPO calls the difference of log-ratios."""
        return self.chosen_logratio - self.rejected_logratio

    @cached_property
    def margin_per_token(self) -> Tensor:
        """l_w / n_w - l_l / n_l, (B,)."""
        return self.chosen_logratio / self.chosen_length - self.rejected_logratio / self.rejected_length

    @staticmethod
    def _reference(logps: Tensor | None) -> Tensor:
        if logps is None:
            raise ValueError("this run has no reference: register the loss without reference_free=True to use it")
        return logps


class PreferenceLoss(NamedTuple):
    """A registered loss: the function, whether it does without a reference, and its knobs with their defaults."""

    function: Callable[..., Tensor]
    reference_free: bool
    knobs: dict[str, float]

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return inspect.getdoc(self.function).partition("\n")[0] if self.function.__doc__ else ""


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}
KNOB_RANGES = {  # of knobs that mean the same in every loss
    "beta": (lambda value: 0 < value < math.inf, "above 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
}
LossFunction = Callable[..., Tensor]  # (pairs, *, knob=number, ...) -> (B,) nats


def preference_loss(name: str, *, reference_free: bool = False) -> Callable[[LossFunction], LossFunction]:
    """Registers a loss under a name.

    Args:
        name: what `--loss` takes.
        reference_free: the loss reads no ref_* log-probabilities, so none are computed.
    Raises:
        ValueError: when the name is taken by another function, or a keyword argument has no number as its default.
            The same function may come again, as when a notebook cell is run twice.
    """

    def register(function: LossFunction) -> LossFunction:
        taken = PREFERENCE_LOSSES.get(name)
        if taken and _full_name(taken.function) != _full_name(function):
            raise ValueError(f"the loss name {name!r} is taken; registered are {', '.join(PREFERENCE_LOSSES)}")
        _, *knobs = inspect.signature(function).parameters.values()
        for knob in knobs:
            if not isinstance(knob.default, int | float):
                raise ValueError(f"loss {name!r}: its argument {knob.name!r} needs a number as default")
        PREFERENCE_LOSSES[name] = PreferenceLoss(function, reference_free, {k.name: k.default for k in knobs})
        return function

    return register


def _full_name(function: LossFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def load_loss_file(path: str | Path) -> None:
    """Runs a Python file of the user's, for the losses it registers.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"loss_file {path}: no such file")
    try:
        code = compile(Path(path).read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
        exec(code, {"__name__": Path(path).stem, "__file__": str(path)})
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"loss_file {path}: {type(error).__name__}: {error}") from error


def find_loss(name: str) -> PreferenceLoss:
    """The registered loss of that name.

    Raises:
        ValueError: when there is none.
    """
    if name not in PREFERENCE_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(sorted(PREFERENCE_LOSSES))}, got {name!r}")
    return PREFERENCE_LOSSES[name]


def bind_loss(name: str, knobs: Mapping[str, float]) -> Callable[[PairBatch], Tensor]:
    """The loss of that name with its knobs set.

    Raises:
        ValueError: for an unknown name, a knob this loss does not take, or a value out of its range.
    """
    loss = find_loss(name)
    for knob, value in knobs.items():
        if knob not in loss.knobs:
            raise ValueError(f"loss {name!r} does not take {knob!r}; its knobs are {', '.join(loss.knobs) or 'none'}")
        is_allowed, rule = KNOB_RANGES.get(knob, (math.isfinite, "a finite number"))
        if not is_allowed(value):
            raise ValueError(f"loss {name!r}: {knob} must be {rule}, got {value}")
    return functools.partial(_evaluate, name, dict(knobs))


def _evaluate(name: str, knobs: Mapping[str, float], pairs: PairBatch) -> Tensor:
    losses, expected = PREFERENCE_LOSSES[name].function(pairs, **knobs), (len(pairs.chosen_mask),)
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        what = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss {name!r} must return a tensor of floats, one value per pair, got {what}")
    if losses.shape != expected:
        raise ValueError(f"loss {name!r} must return one value per pair, {expected}, got shape {tuple(losses.shape)}")
    if pairs.policy_chosen_logps.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
        raise ValueError(
            f"loss {name!r} must depend on the policy's log-probabilities: what it returned has no gradient"
        )
    return losses


@preference_loss("sigmoid")
def sigmoid(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigma(beta (l_w - l_l)) - e log sigma(-beta (l_w - l_l)), e = label_smoothing.

    Source: arXiv:2305.18290 Eq. 7; with e > 0, ericmitchell.ai/cdpo.pdf Eq. 3.
    """
    epsilon, z = label_smoothing, beta * pairs.margin
    return -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)


@preference_loss("cdpo")
def cdpo(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO: DPO with labels that are wrong with probability label_smoothing.

    Source: ericmitchell.ai/cdpo.pdf Eq. 3.
    """
    return sigmoid(pairs, beta=beta, label_smoothing=label_smoothing)


@preference_loss("robust")
def robust(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """rDPO: (-(1-e) log sigma(z) + e log sigma(-z)) / (1 - 2e), unbiased under flipped labels; z = beta (l_w - l_l).

    Source: arXiv:2403.00409 Eq. 12.
    """
    epsilon, z = label_smoothing, beta * pairs.margin
    return (-(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon)


@preference_loss("ipo")
def ipo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """IPO: (l_w/n_w - l_l/n_l - 1/(2 beta))^2, on means per token as trl does; the paper writes sums.

    Source: arXiv:2310.12036 Eq. 17.
    """
    return (pairs.margin_per_token - 1 / (2 * beta)) ** 2


@preference_loss("hinge")
def hinge(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """Hinge on the log-ratios: max(0, 1 - beta (l_w - l_l)).

    Source: arXiv:2309.06657 Eq. 10 (RSO), after SLiC, arXiv:2305.10425.
    """
    return torch.relu(1 - beta * pairs.margin)


@preference_loss("sigmoid_norm")
def sigmoid_norm(pairs: PairBatch, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: -log sigma(beta (l_w/n_w - l_l/n_l)).

    Source: arXiv:2411.15124 Eq. 6 (Tulu 3).
    """
    return -F.logsigmoid(beta * pairs.margin_per_token)


@preference_loss("apo_zero")
def apo_zero(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """APO-zero: 1 - sigma(beta l_w) + sigma(beta l_l), for chosen answers better than the policy's own.

    Source: arXiv:2408.06266 Eq. 2.
    """
    return 1 - torch.sigmoid(beta * pairs.chosen_logratio) + torch.sigmoid(beta * pairs.rejected_logratio)


@preference_loss("apo_down")
def apo_down(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """APO-down: sigma(beta l_w) + 1 - sigma(beta (l_w - l_l)), for chosen answers worse than the policy's own.

    Source: arXiv:2408.06266 Eq. 3.
    """
    return torch.sigmoid(beta * pairs.chosen_logratio) + 1 - torch.sigmoid(beta * pairs.margin)


@preference_loss("simpo", reference_free=True)
def simpo(pairs: PairBatch, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: -log sigma(beta (s_w/n_w - s_l/n_l) - gamma), without a reference.

    Source: arXiv:2405.14734 Eq. 6.
    """
    per_token = pairs.policy_chosen / pairs.chosen_length - pairs.policy_rejected / pairs.rejected_length
    return -F.logsigmoid(beta * per_token - gamma)


@preference_loss("orpo", reference_free=True)
def orpo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """ORPO: -s_w/n_w - beta log sigma(log odds_w - log odds_l), odds = p/(1-p) with p = exp(s/n), no reference.

    Source: arXiv:2403.07691 Eq. 6 and 7; the likelihood term is that of the answer, as in the paper.
    """
    chosen = pairs.policy_chosen / pairs.chosen_length
    rejected = pairs.policy_rejected / pairs.rejected_length
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p; p is kept from rounding to 1, where the odds are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-torch.expm1(logp)).log()
