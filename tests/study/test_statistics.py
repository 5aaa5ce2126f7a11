"""Statistics on data with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from p2r_jax.study.statistics import Estimate, equivalence_p, estimate, holm, verdict

SEEDS, QUESTIONS = 8, 200
TRUE = (0.7, 0.65)
"""Accuracies of two arms."""


def simulated(rng, seed_sd: float, question_reach: float, crossed: bool = False):
    """Verdicts [arm, seed, question]. Arms share their questions' difficulty, part of what a seed
    adds, and part of the noise. No probability leaves [0, 1], so `TRUE` is exact."""
    own = rng.uniform(-1, 1, (2, SEEDS, 1)) * seed_sd * np.sqrt(3) * 0.8
    shared = rng.uniform(-1, 1, (SEEDS, 1)) * seed_sd * np.sqrt(3) * 0.6
    difficulty = rng.uniform(-1, 1, (1 if crossed else SEEDS, QUESTIONS)) * question_reach
    # Under a crossed design an arm also finds some questions harder than the other arm does.
    apart = rng.uniform(-0.05, 0.05, (2, 1, QUESTIONS)) if crossed else 0
    chance = np.array(TRUE)[:, None, None] + own + shared + difficulty + apart
    assert 0 <= chance.min() <= chance.max() <= 1
    noise = rng.random((2, SEEDS, QUESTIONS))
    noise[1] = np.where(rng.random((SEEDS, QUESTIONS)) < 0.6, noise[0], noise[1])
    return (noise < chance).astype(float)


def coverage(studies: int, draws: int, crossed: bool = False, **design) -> dict[str, float]:
    """How often the intervals hold the truth, of arm and contrast."""
    rng = np.random.default_rng(1)
    held: dict[str, list[bool]] = {}
    for number in range(studies):
        first, second = simulated(rng, crossed=crossed, **design)
        for name, values, truth in (
            ("arm", first, TRUE[0]),
            ("contrast", first - second, TRUE[0] - TRUE[1]),
        ):
            found = estimate([*values], crossed=crossed, draws=draws, seed=number)
            held.setdefault(name, []).append(found.low <= truth <= found.high)
            if draws:
                inside = found.bootstrap_low <= truth <= found.bootstrap_high
                held.setdefault(f"{name}, bootstrap", []).append(inside)
    return {name: float(np.mean(inside)) for name, inside in held.items()}


class TestCoverage:
    """Of 1,000 simulated studies; 95 % are asked for, and 0.7 points is the chance error."""

    @pytest.mark.parametrize("seed_sd, question_reach", [(0.0, 0.2), (0.03, 0.15), (0.06, 0.1)])
    def test_holds_whether_seeds_differ_or_not(self, seed_sd, question_reach):
        found = coverage(1000, 0, seed_sd=seed_sd, question_reach=question_reach)
        assert all(0.93 <= share <= 0.97 for share in found.values()), found

    def test_of_the_bootstrap_beside_it(self):
        found = coverage(1000, 200, seed_sd=0.03, question_reach=0.15)
        assert len(found) == 4
        assert all(0.93 <= share <= 0.97 for share in found.values()), found

    def test_holds_where_all_seeds_have_the_same_questions(self):
        """Which an interval over seed means alone does not."""
        found = coverage(1000, 0, crossed=True, seed_sd=0.02, question_reach=0.15)
        assert all(0.93 <= share <= 0.97 for share in found.values()), found
        rng, held = np.random.default_rng(1), []
        for _ in range(300):
            first, _ = simulated(rng, 0.02, 0.15, crossed=True)
            nested = estimate([*first], draws=0)
            held.append(nested.low <= TRUE[0] <= nested.high)
        assert np.mean(held) < 0.93

    def test_of_its_bootstrap(self):
        found = coverage(200, 200, crossed=True, seed_sd=0.02, question_reach=0.15)
        assert all(0.90 <= share <= 0.99 for share in found.values()), found


class TestAnEstimate:
    VALUES = (np.array([1.0, 0, 1, 1]), np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 1]))

    def test_of_nested_seeds_is_students_t_over_their_means(self):
        found = estimate(self.VALUES, draws=0)
        test = stats.ttest_1samp([0.75, 0.5, 1.0], 0)
        interval = test.confidence_interval(0.95)
        assert found.value == 0.75
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert (found.p, found.degrees) == pytest.approx((test.pvalue, 2))
        assert (found.seeds, found.questions) == (3, 12)

    def test_of_a_contrast_is_the_paired_t_test(self):
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 2, (2, 5, 40)).astype(float)
        found = estimate([*(a - b)], draws=0)
        assert found.p == pytest.approx(stats.ttest_rel(a.mean(1), b.mean(1)).pvalue)

    def test_counts_every_seed_alike_however_many_questions_were_graded(self):
        found = estimate([np.ones(2), np.zeros(8), np.zeros(4)], draws=0)
        assert found.value == pytest.approx(1 / 3)

    def test_of_crossed_seeds_agrees_with_the_variance_components(self):
        table = np.random.default_rng(3).normal(size=(6, 50))
        table += np.random.default_rng(4).normal(size=(6, 1)) + np.linspace(-3, 3, 50)
        found = estimate([*table], crossed=True, draws=0)
        rest = table - table.mean(1)[:, None] - table.mean(0) + table.mean()
        residual = (rest**2).sum() / (5 * 49)
        seeds = table.mean(1).var(ddof=1) - residual / 50
        questions = table.mean(0).var(ddof=1) - residual / 6
        expected = seeds / 6 + questions / 50 + residual / 300
        assert found.standard_error == pytest.approx(np.sqrt(expected))

    def test_is_the_same_for_the_same_draws(self):
        values = np.random.default_rng(0).integers(0, 2, (6, 40)).astype(float)
        one, same, other = (estimate([*values], draws=500, seed=s) for s in (1, 1, 2))
        assert one == same
        assert one.bootstrap_low != other.bootstrap_low

    @pytest.mark.parametrize("values", [[np.array([1.0, 0])], [np.ones(3), np.ones(3)]])
    def test_has_no_interval_where_nothing_says_how_much_seeds_differ(self, values):
        found = estimate(values)
        assert (found.low, found.p, found.bootstrap_high, found.degrees) == (None,) * 4
        assert equivalence_p(found, 0.03) is None
        assert verdict(found, found.p, None, 0.05) == "undecided"

    @pytest.mark.parametrize("values", [[], [np.ones(0)], [np.ones((2, 2))]])
    def test_of_nothing_is_an_error(self, values):
        with pytest.raises(ValueError, match="at least one question"):
            estimate(values)

    def test_of_crossed_seeds_that_are_not_is_an_error(self):
        with pytest.raises(ValueError, match="the same questions"):
            estimate([np.ones(3), np.ones(2)], crossed=True)


class TestHolm:
    @pytest.mark.parametrize(
        "given, expected",
        [
            ([0.04], [0.04]),
            ([0.03, 0.01], [0.03, 0.02]),
            ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
            ([0.9, 0.8], [1.0, 1.0]),
            ([], []),
        ],
    )
    def test_by_hand(self, given, expected):
        assert holm(given) == pytest.approx(expected)


def found(value: float, error: float, degrees: float = 7.0) -> Estimate:
    return Estimate(value, 0, 0, None, error, degrees, None, None, 8, 1600, False)


class TestEquivalence:
    def test_by_hand(self):
        """t = (0.03 - 0.01) / 0.01 = 2 on 7 degrees of freedom: one-sided p = 0.0428."""
        assert equivalence_p(found(0.01, 0.01), 0.03) == pytest.approx(0.0428, abs=5e-5)
        assert equivalence_p(found(-0.01, 0.01), 0.03) == pytest.approx(0.0428, abs=5e-5)

    def test_is_two_one_sided_t_tests(self):
        means = np.array([0.01, -0.02, 0.015, 0.0, 0.02])
        own = estimate([np.array([m, m]) for m in means], draws=0)
        below = stats.ttest_1samp(means, -0.03, alternative="greater").pvalue
        above = stats.ttest_1samp(means, 0.03, alternative="less").pvalue
        assert equivalence_p(own, 0.03) == pytest.approx(max(below, above))

    def test_is_the_90_percent_interval_within_the_margin(self):
        for value, inside in ((0.009, True), (0.013, False)):
            reach = stats.t.ppf(0.95, 7) * 0.01
            assert bool(value + reach < 0.03) is inside
            assert bool(equivalence_p(found(value, 0.01), 0.03) < 0.05) is inside


@pytest.mark.parametrize(
    "value, p, equivalence, expected",
    [
        (0.1, 0.01, 0.9, "higher"),
        (-0.1, 0.01, 0.9, "lower"),
        (0.01, 0.01, 0.01, "higher, within the margin"),
        (0.01, 0.3, 0.01, "equivalent"),
        (0.05, 0.06, 0.5, "undecided"),
        (0.05, None, None, "undecided"),
    ],
)
def test_the_verdict(value, p, equivalence, expected):
    assert verdict(found(value, 0.01), p, equivalence, 0.05) == expected
