"""What a few seeds can tell: means, paired differences with intervals, p-values that know how many were looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % interval; these are NaN where a single value tells of no spread."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def known(values: np.ndarray, summary: Callable[..., Any] = np.mean) -> float:
    """A summary of those of (n,) values that are no NaN; NaN where there are none."""
    there = values[~np.isnan(values)]
    return float(summary(there)) if len(there) else math.nan


def mean_interval(values: np.ndarray) -> Estimate:
    """The mean of (n,) values with Student's interval, mean -+ t s / sqrt(n), t of n - 1 degrees of freedom."""
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * standard_error(values)
    return Estimate(mean, mean - half, mean + half)


def paired_interval(values: np.ndarray, others: np.ndarray) -> Estimate:
    """The mean of (n,) values - others, pair by pair, with Student's interval.

    Not the bootstrap's: resampling so few pairs gives too narrow a one, of normal differences 74 % in place of 95 for
    three pairs, 83 for five, 89 for ten.
    """
    return mean_interval(values - others)


def paired_p(values: np.ndarray, others: np.ndarray) -> float:
    """Two-sided p-value of the paired t-test of (n,) values against others.

    NaN for a single pair, and where all differ by the same: two seeds that lose one answer each tell of no spread. 1
    where none differ.
    """
    apart = values - others
    if len(apart) < 2:
        return math.nan
    mean, error = float(apart.mean()), standard_error(apart)
    if error == 0:
        return 1.0 if mean == 0 else math.nan
    return 1 - t_inside(abs(mean) / error, len(apart) - 1)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of (n,) values, n above 1; 0 where all are one, whose mean may be rounded."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if np.ptp(values) else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p-values: below alpha, a difference stands with a chance below alpha that any of them is none.

    The k-th smallest of m is multiplied by m - k + 1; none may be below the one before it. NaN stays NaN, and does not
    count.

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    corrected, least = list(p_values), 0.0
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with `df` degrees of freedom, a whole number, as the finite sum that it then is.

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    term = math.cos(angle) if df % 2 else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if df % 2 else 2, df - 1, 2):  # each term is the one before by (k - 1)/k cos^2
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if df % 2 else math.sin(angle) * total


def t_quantile(df: int) -> float:
    """The t of which P(|T| < t) is 0.95, by bisection."""
    low, high = 0.0, 16.0  # that of one degree of freedom, the largest, is 12.7
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < LEVEL else (low, middle)
    return (low + high) / 2


def spearman(values: np.ndarray, others: np.ndarray) -> float:
    """Rank correlation of (n,) values and others, equal ones at their mean rank; NaN where all of one are equal."""
    one, other = (ranks - ranks.mean() for ranks in (mean_ranks(values), mean_ranks(others)))
    spread = math.sqrt(float((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / spread if spread else math.nan


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 0 on; equal values share the mean of theirs."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[groups]
