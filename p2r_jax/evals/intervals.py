"""Proportions and paired differences with their uncertainty.

Closed formulas on counts; nothing here knows what a record is.  The standard library is enough:
tests compare with SciPy.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A proportion with its Wilson interval; all but `n` are fractions of 1.

    `accuracy` is None, and the interval (0, 1), when nothing was counted.
    """

    accuracy: float | None
    low: float
    high: float
    n: int

    @classmethod
    def of(
        cls,
        correct: Sequence[float],
        clusters: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
    ) -> Accuracy:
        """Counts verdicts (0 or 1).

        Args:
          correct: one verdict per record.
          clusters: for each record, what it shares with others (HR-Bench asks each question in 4
            rotations).  Answers within a cluster rise and fall together, so n is divided by the
            design effect (at least 1) before the Wilson formula.  Example: 4 rotations that
            always agree give about the interval of n/4 independent questions.
          confidence: coverage of the interval.
        """
        n = len(correct)
        total = sum(correct)
        effective = n / _design_effect(correct, clusters) if n and clusters is not None else n
        low, high = wilson_interval(total * effective / n if n else 0, effective, confidence)
        return cls(total / n if n else None, low, high, n)

    def __str__(self) -> str:
        if self.accuracy is None:
            return "- (n=0)"
        interval = f"{100 * self.low:.1f}-{100 * self.high:.1f}"
        return f"{100 * self.accuracy:.1f} % [{interval}] (n={self.n})"


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions; (0, 1) when n = 0.

    >>> [round(limit, 3) for limit in wilson_interval(178, 191)]
    [0.887, 0.96]

    Args:
      successes: count, 0 to n; may be fractional when n is an effective sample size.
      n: number of trials.
      confidence: coverage, strictly between 0 and 1.

    Raises:
      ValueError: counts or confidence are outside their range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, is {confidence}")
    if n < 0 or not 0 <= successes <= n * (1 + 1e-12):
        raise ValueError(f"needs 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    z = _quantile(confidence)
    p = min(successes / n, 1.0)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At p = 0 and p = 1 one limit is exactly 0 or 1; rounding must not move it.
    low = 0.0 if p == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if p == 1 else min(1.0, (centre + half) / scale)
    return low, high


def paired_interval(gain: int, harm: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the paired difference (gain - harm) / n by Bonett and Price (2012).

    A Wald interval after one observation is added to each discordant cell; recommended by
    Fagerland, Lydersen and Laake (2014) for its coverage from small n on.
    """
    p_gain, p_harm = (gain + 1) / (n + 2), (harm + 1) / (n + 2)
    centre = p_gain - p_harm
    half = _quantile(confidence) * math.sqrt((p_gain + p_harm - centre**2) / (n + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar_p(gain: int, harm: int) -> float:
    """Exact two-sided p-value that gains and harms are equally likely; 1 if there are none.

    >>> mcnemar_p(10, 2)
    0.03857421875
    """
    n = gain + harm
    # Integers to the last step: 0.5**n underflows on large benchmarks.
    tail = sum(math.comb(n, k) for k in range(min(gain, harm) + 1))
    return min(1.0, 2 * tail / 2**n)


def _design_effect(correct: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Variance of the mean with clusters over its variance without, at least 1."""
    n = len(correct)
    mean = sum(correct) / n
    residuals: dict[Hashable, float] = defaultdict(float)
    for verdict, cluster in zip(correct, clusters, strict=True):
        residuals[cluster] += verdict - mean
    count = len(residuals)
    if count == n:
        return 1.0
    if mean in (0, 1) or count == 1:
        return n / count  # No variance to compare: take clusters as fully correlated.
    variance = count / (count - 1) * sum(r * r for r in residuals.values()) / n**2
    return min(max(1.0, variance / (mean * (1 - mean) / n)), float(n))


def _quantile(confidence: float) -> float:
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
