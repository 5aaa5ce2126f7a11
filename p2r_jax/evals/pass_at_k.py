"""Several answers to each question: how often one of k is right, and what most of k say."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from p2r_jax.evals.intervals import Accuracy, cluster_bootstrap
from p2r_jax.evals.records import Record, clusters, sample_of, verdict


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that among k of n answers, drawn without replacement, at least one is right.

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises:
      ValueError: not 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"needs 0 <= right <= n and 1 <= k <= n, got right={right}, n={n}, k={k}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_verdict(answers: Sequence[Record]) -> int:
    """Verdict of the prediction that most answers share; of two as frequent, the earlier one.

    Answers without a prediction do not vote; if none has one, the majority is wrong.
    """
    votes = [r for r in answers if r.get("prediction") is not None]
    if not votes:
        return 0
    # Equal counts stay in order of first appearance.
    ((winner, _),) = Counter(str(r["prediction"]) for r in votes).most_common(1)
    return next(verdict(r) for r in votes if str(r["prediction"]) == winner)


def sampled_figures(records: Sequence[Record]) -> dict[str, Any] | None:
    """pass@k and maj@k of the records of one mode; None if questions are answered once.

    Returns a JSON-able dict:
      samples: answers to a question, n.
      questions: with all of them; incomplete: with fewer (a killed run), left out.
      pass: {k: {accuracy, low, high, n}} for k = 1, 2, 4, ... and n; the mean of `pass_at_k` over
        questions, with a bootstrap interval over images, or over questions if no image repeats.
      maj: the same of `majority_verdict` of the first k answers, with Wilson intervals.
    """
    if not any(sample_of(record) for record in records):
        return None
    answers: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        answers[record["id"]].append(record)
    samples = max(map(len, answers.values()))
    complete = [sorted(a, key=sample_of) for a in answers.values() if len(a) == samples]
    first = [{**a[0], "sample": 0} for a in complete]
    shares = clusters(first)
    right = [sum(map(verdict, a)) for a in complete]
    ks = [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]
    found: dict[str, Any] = {
        "samples": samples,
        "questions": len(complete),
        "incomplete": len(answers) - len(complete),
        "pass": {},
        "maj": {},
    }
    for k in ks:
        values = [pass_at_k(samples, c, k) for c in right]
        low, high = cluster_bootstrap(values, shares or range(len(values)))
        found["pass"][str(k)] = {
            "accuracy": sum(values) / len(values),
            "low": low,
            "high": high,
            "n": len(values),
        }
        majorities = [majority_verdict(a[:k]) for a in complete]
        found["maj"][str(k)] = dataclasses.asdict(Accuracy.of(majorities, shares))
    return found
