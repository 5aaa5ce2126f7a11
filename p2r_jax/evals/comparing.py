"""Two runs, or two modes, question by question: what one of them gains and what it harms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from p2r_jax.evals.intervals import (
    cluster_bootstrap,
    design_effect,
    mcnemar_p,
    paired_interval,
    sign_flip_p,
)
from p2r_jax.evals.records import Record, clusters, sample_of, verdict

Key: TypeAlias = tuple[Hashable, int]
"""Id and sample: what pairs two answers."""
Change: TypeAlias = Literal["gain", "harm", "both right", "both wrong"]

_CHANGES: dict[tuple[int, int], Change] = {
    (0, 1): "gain",
    (1, 0): "harm",
    (1, 1): "both right",
    (0, 0): "both wrong",
}


def compare(
    records_a: Iterable[Record], records_b: Iterable[Record], confidence: float = 0.95
) -> dict[str, Any]:
    """Paired comparison of two runs, or two modes, over the answers that both gave.

    Returns a JSON-able dict:
      n: answers of both; only_a, only_b: of one alone, left out of everything else.
      accuracy_a, accuracy_b, difference = accuracy_b - accuracy_a: fractions.
      gain: wrong in a, right in b.  harm: right in a, wrong in b.
      low, high: interval of the difference by Bonett and Price (2012): a Wald interval after one
        observation is added to each discordant cell, near nominal coverage from n = 25 on.
      mcnemar_p: exact two-sided McNemar test, a binomial test of gain among gain + harm at 1/2.
      by_category: {category: the same without only_a, only_b and by_category}.

    Where answers share an image or question (`records.clusters`), they are not independent: counts
    are divided by the design effect before the interval, and the test flips the signs of whole
    clusters (`sign_flip_p`).  Then there are also
      clusters: how many.
      bootstrap_low, bootstrap_high: interval of the difference, clusters drawn anew.

    Raises:
      ValueError: an id repeats on one side (mixed modes), or no id is on both.
    """
    a, b = _by_key(records_a, "a"), _by_key(records_b, "b")
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError("no question id is on both sides: these are runs of different questions")
    sides_a, sides_b = [a[key] for key in shared], [b[key] for key in shared]
    shares = clusters(sides_a) or clusters(sides_b)
    categories: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(sides_b):
        categories[str(record.get("category") or "")].append(i)

    def of(indices: Sequence[int]) -> dict[str, Any]:
        return _figures(
            [(verdict(sides_a[i]), verdict(sides_b[i])) for i in indices],
            None if shares is None else [shares[i] for i in indices],
            confidence,
        )

    return {
        **of(range(len(shared))),
        "only_a": len(a) - len(shared),
        "only_b": len(b) - len(shared),
        "by_category": {name: of(categories[name]) for name in sorted(categories)},
    }


def changes(records_a: Iterable[Record], records_b: Iterable[Record]) -> dict[Key, Change]:
    """What became of each answer that both sides gave.  Raises ValueError like `compare`."""
    a, b = _by_key(records_a, "a"), _by_key(records_b, "b")
    return {key: _CHANGES[verdict(a[key]), verdict(b[key])] for key in a if key in b}


def _figures(
    pairs: Sequence[tuple[int, int]], shares: Sequence[Hashable] | None, confidence: float
) -> dict[str, Any]:
    n = len(pairs)
    gain = sum(a < b for a, b in pairs)
    harm = sum(a > b for a, b in pairs)
    if shares is not None and len(set(shares)) == n:
        shares = None
    differences = [b - a for a, b in pairs]
    effect = 1.0 if shares is None else design_effect(differences, shares)
    low, high = paired_interval(gain / effect, harm / effect, n / effect, confidence)
    figures: dict[str, Any] = {
        "n": n,
        "accuracy_a": sum(a for a, _ in pairs) / n,
        "accuracy_b": sum(b for _, b in pairs) / n,
        "difference": (gain - harm) / n,
        "low": low,
        "high": high,
        "gain": gain,
        "harm": harm,
    }
    if shares is None:
        return figures | {"mcnemar_p": mcnemar_p(gain, harm)}
    sums: dict[Hashable, int] = defaultdict(int)
    for share, difference in zip(shares, differences, strict=True):
        sums[share] += difference
    drawn = cluster_bootstrap(differences, shares, confidence)
    return figures | {
        "mcnemar_p": sign_flip_p(list(sums.values())),
        "clusters": len(sums),
        "bootstrap_low": drawn[0],
        "bootstrap_high": drawn[1],
    }


def _by_key(records: Iterable[Record], side: str) -> Mapping[Key, Record]:
    found: dict[Key, Record] = {}
    for record in records:
        key = (record["id"], sample_of(record))
        if key in found:
            raise ValueError(f"id {key[0]!r} repeats on side {side}: pass one mode of one run")
        found[key] = record
    return found
