"""Layout of training curves: phases, smoothing, values that are not finite, thinning, ticks."""

from __future__ import annotations

import itertools

import pytest

from p2r_jax.evals import charts


def test_phases_are_found_and_labelled():
    rows = [{"step": s, "phase": "ab"[s // 5 % 2], "round": s // 10, "x": 1.0} for s in range(20)]
    labels = [p.label for p in charts.curves(rows).phases]
    assert labels == ["a 0", "b 0", "a 1", "b 1"]
    edges = [(p.left, p.right) for p in charts.curves(rows).phases]
    assert edges[0][0] == charts.LEFT
    assert edges[-1][1] == charts.RIGHT
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_an_evaluation_between_phases_is_no_phase_and_no_step():
    rows = [{"step": s, "phase": "ab"[(s - 1) // 5], "round": 0, "x": 1.0} for s in range(1, 11)]
    for step, name in ((0, "before"), (5, "after_phase1_a"), (10, "after")):
        rows.append({"step": step, "phase": "eval", "name": name, "eval/p2r/accuracy": 0.5})
    curves = charts.curves(rows)
    assert [(p.label, p.first, p.last) for p in curves.phases] == [("a 0", 1, 5), ("b 0", 6, 10)]
    assert curves.steps == 10


def test_the_mean_restarts_with_a_phase():
    rows = [{"step": s, "phase": "ab"[s // 20], "x": float(s // 20)} for s in range(40)]
    (chart,) = charts.curves(rows).groups[0].charts
    assert chart.hover["series"][0]["mean"] == [0.0] * 20 + [1.0] * 20
    assert chart.lines[0].smooth.count("M") == 2


def test_values_that_are_not_finite_are_marked():
    rows = [{"step": s, "x": float("nan") if s == 3 else 1.0} for s in range(10)]
    (chart,) = charts.curves(rows).groups[0].charts
    assert len(chart.bad_steps) == 1
    assert "1 steps not finite" in chart.description
    assert "nan" not in chart.lines[0].raw


def test_a_replayed_step_counts_once():
    rows = [{"step": s, "x": float(i)} for i, s in enumerate([0, 1, 2, 1, 2, 3])]
    (chart,) = charts.curves(rows).groups[0].charts
    assert chart.hover["series"][0]["step"] == [0, 1, 2, 3]
    assert chart.hover["series"][0]["value"] == [0, 3, 4, 5]


def test_long_curves_are_thinned_but_keep_their_spikes():
    rows = [{"step": s, "x": 100.0 if s == 7777 else 0.0} for s in range(20_000)]
    (chart,) = charts.curves(rows).groups[0].charts
    series = chart.hover["series"][0]
    assert len(series["step"]) <= 1.1 * charts.MAX_POINTS
    assert 100.0 in series["value"]


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-0.06, 0.02), (1e-7, 3e-6), (5, 5), (0, 0), (-3e5, 2e6), (0.99, 1)]
)
def test_ticks_cover_the_data_with_round_numbers(low, high):
    values = charts.ticks(low, high)
    assert values[0] <= low <= high <= values[-1]
    assert 3 <= len(values) <= 8
    assert all(len(charts.tick_text(v)) <= 7 for v in values)


def test_one_row_is_enough():
    (chart,) = charts.curves([{"step": 4, "reward/mean": 0.5}]).groups[0].charts
    assert len(chart.lines[0].dots) == 1
