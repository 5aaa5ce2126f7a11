"""study.json: what the arms reached, what they cost, and what the contrasts say."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2r_jax.config import TrainConfig
from p2r_jax.study.config import Contrast, Study
from p2r_jax.study.results import MEASURES, Result, read_result
from p2r_jax.study.statistics import Estimate, equivalence_p, estimate, holm, verdict

PACKAGES = ("p2r_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")

Runs = Mapping[tuple[str, int], tuple[Path, TrainConfig]]
"""Folder and config of finished runs, by arm and seed."""


def analyse(plan: Study, runs: Runs, missing: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the outputs tell, JSON-able. missing: runs that are not finished.

    Raises ValueError for runs that cannot be compared.
    """
    results = {
        key: read_result(folder, config, plan.arm(key[0]).metric)
        for key, (folder, config) in runs.items()
    }
    by_arm = {
        arm.name: {s: results[arm.name, s] for s in plan.seeds if (arm.name, s) in results}
        for arm in plan.arms
    }
    return {
        "study": plan.plain(),
        "versions": _versions(),
        "missing": [dict(one) for one in missing],
        "measures": MEASURES,
        "arms": {
            arm.name: {
                "metric": arm.metric,
                "description": arm.description,
                "estimate": _arm_estimate(by_arm[arm.name], plan),
                "before": _mean(r.before for r in by_arm[arm.name].values()),
                "measures": {
                    name: _mean(r.measures[name] for r in by_arm[arm.name].values())
                    for name in MEASURES
                },
                "seeds": {str(s): _seed(r) for s, r in by_arm[arm.name].items()},
                "curve": _curve(list(by_arm[arm.name].values()), plan.confidence),
            }
            for arm in plan.arms
        },
        "contrasts": _contrasts(plan, by_arm),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _graded(result: Result) -> dict[str, int]:
    return {id: value for id, value in result.correct.items() if value is not None}


def _seed(result: Result) -> dict[str, Any]:
    graded = _graded(result)
    return {
        "accuracy": sum(graded.values()) / len(graded),
        "before": result.before,
        "questions": len(graded),
        "ungraded": len(result.correct) - len(graded),
        "measures": dict(result.measures),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _arm_estimate(seeds: Mapping[int, Result], plan: Study) -> dict[str, Any] | None:
    if not seeds:
        return None
    asked = [set(result.correct) for result in seeds.values()]
    return _bounded(_estimate([_graded(r) for r in seeds.values()], asked, plan), 0.0)


def _estimate(
    values: Sequence[Mapping[str, float]], asked: Sequence[set[str]], plan: Study
) -> Estimate:
    """values: of each seed, by question. asked: all questions of each seed, graded or not."""
    # Questions that all seeds share are a benchmark's; those that are named by their seed are not.
    crossed = len(asked) > 1 and all(own == asked[0] for own in asked)
    order = [sorted(own) for own in values]
    if crossed:
        order = [sorted(set.intersection(*map(set, values)))] * len(values)
    arrays = [np.array([own[i] for i in ids]) for own, ids in zip(values, order, strict=True)]
    return estimate(arrays, crossed=crossed, confidence=plan.confidence, draws=plan.draws)


def _bounded(found: Estimate, lowest: float) -> dict[str, Any]:
    """As JSON; ends of intervals that no accuracy can reach are cut. A p-value that an arm's
    accuracy is 0 tells nothing."""
    plain = dataclasses.asdict(found)
    for name in ("low", "high", "bootstrap_low", "bootstrap_high"):
        if plain[name] is not None:
            plain[name] = min(1.0, max(lowest, plain[name]))
    if lowest == 0:
        del plain["p"]
    return plain


def _contrasts(plan: Study, by_arm: Mapping[str, Mapping[int, Result]]) -> list[dict[str, Any]]:
    found = [(contrast, _difference(contrast, plan, by_arm)) for contrast in plan.contrasts]
    tested = [
        (contrast.name, own.p)
        for contrast, own in found
        if contrast.primary and own is not None and own.p is not None
    ]
    corrected = dict(zip((name for name, _ in tested), holm([p for _, p in tested]), strict=True))
    alpha = 1 - plan.confidence
    rows = []
    for contrast, own in found:
        row: dict[str, Any] = {
            "name": contrast.name,
            "first": contrast.first,
            "second": contrast.second,
            "primary": contrast.primary,
            "estimate": None,
        }
        if own is not None:
            holm_p = corrected.get(contrast.name)
            equivalence = equivalence_p(own, plan.margin / 100)
            counted = holm_p if contrast.primary else own.p
            row |= {
                "estimate": _bounded(own, -1.0),
                "p": own.p,
                "p_holm": holm_p,
                "p_equivalence": equivalence,
                "verdict": verdict(own, counted, equivalence, alpha),
            }
        rows.append(row)
    return rows


def _difference(
    contrast: Contrast, plan: Study, by_arm: Mapping[str, Mapping[int, Result]]
) -> Estimate | None:
    """Of the seeds that both arms have; None if there is none."""
    first, second = by_arm[contrast.first], by_arm[contrast.second]
    values: list[dict[str, float]] = []
    asked: list[set[str]] = []
    for seed in (s for s in plan.seeds if s in first and s in second):
        a, b = first[seed], second[seed]
        if a.correct.keys() != b.correct.keys():
            raise ValueError(
                f"{contrast.first} and {contrast.second} were evaluated on other questions with "
                f"seed {seed}: they cannot be compared"
            )
        graded_a, graded_b = _graded(a), _graded(b)
        both = graded_a.keys() & graded_b.keys()
        if both:
            values.append({i: float(graded_a[i] - graded_b[i]) for i in both})
            asked.append(set(a.correct))
    return _estimate(values, asked, plan) if values else None


def _curve(results: Sequence[Result], confidence: float) -> list[dict[str, Any]]:
    """Mean over seeds and its interval, at the steps that all seeds were evaluated at."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for result in results:
        for step, samples, accuracy in result.curve:
            by_step.setdefault(step, []).append((samples, accuracy))
    points = []
    for step in sorted(by_step):
        if len(by_step[step]) < len(results):
            continue
        values = [accuracy for _, accuracy in by_step[step]]
        found = estimate([np.array([v]) for v in values], confidence=confidence, draws=0)
        low, high = found.low, found.high
        points.append(
            {
                "step": step,
                "samples": statistics.fmean(samples for samples, _ in by_step[step]),
                "accuracy": found.value,
                "low": None if low is None else max(0.0, low),
                "high": None if high is None else min(1.0, high),
            }
        )
    return points
