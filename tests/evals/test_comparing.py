"""Clusters in intervals and tests, gain and harm by category, several answers to a question."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2r_jax.evals.comparing import changes, compare
from p2r_jax.evals.intervals import (
    Accuracy,
    cluster_bootstrap,
    design_effect,
    mcnemar_p,
    paired_interval,
    sign_flip_p,
)
from p2r_jax.evals.pass_at_k import majority_verdict, pass_at_k, sampled_figures
from p2r_jax.evals.scoring import summarize


def rows(verdicts, **fields):
    """Records with the given verdicts; `fields` are functions of the index."""
    return [
        {"id": i, "mode": "p2r", "correct": v, **{k: f(i) for k, f in fields.items()}}
        for i, v in enumerate(verdicts)
    ]


class TestBootstrap:
    def test_of_single_answers_is_near_wilson(self):
        values = [1] * 60 + [0] * 40
        low, high = cluster_bootstrap(values, range(100))
        wilson = Accuracy.of(values)
        assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=0.02)

    def test_draws_whole_clusters(self):
        values = [v for v in [1] * 30 + [0] * 20 for _ in range(4)]
        four = cluster_bootstrap(values, [i // 4 for i in range(200)])
        assert four == pytest.approx(cluster_bootstrap([1] * 30 + [0] * 20, range(50)))

    def test_equals_drawing_clusters_one_by_one(self):
        rng = np.random.default_rng(3)
        sizes = rng.integers(1, 5, 40)
        groups = [rng.integers(0, 2, size) for size in sizes]
        means = []
        for _ in range(4000):
            drawn = [groups[i] for i in rng.integers(0, 40, 40)]
            means.append(np.concatenate(drawn).mean())
        values = np.concatenate(groups).tolist()
        clusters = np.repeat(np.arange(40), sizes).tolist()
        low, high = cluster_bootstrap(values, clusters)
        assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)

    @given(
        st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=30),
        st.randoms(),
    )
    def test_does_not_depend_on_order_or_names(self, pairs, random):
        mixed = random.sample(pairs, len(pairs))
        one = cluster_bootstrap(*zip(*pairs, strict=True), resamples=50)
        assert one == cluster_bootstrap(
            [v for v, _ in mixed], [f"c{c}" for _, c in mixed], resamples=50
        )
        assert 0 <= one[0] <= one[1] <= 1

    def test_seed_and_confidence(self):
        values = [i % 7 / 7 for i in range(40)]
        clusters = [i * i % 23 for i in range(40)]
        assert cluster_bootstrap(values, clusters, seed=1) != cluster_bootstrap(values, clusters)
        narrow = cluster_bootstrap(values, clusters, confidence=0.5)
        wide = cluster_bootstrap(values, clusters)
        assert wide[0] < narrow[0] < narrow[1] < wide[1]
        with pytest.raises(ValueError, match="at least one"):
            cluster_bootstrap([], [])

    def test_beside_and_not_instead(self):
        """At 100 % a bootstrap has no width; the interval that is shown must have one."""
        perfect = rows([1] * 40, image_hash=lambda i: i // 4)
        summary = summarize(perfect)
        assert (summary["bootstrap_low"], summary["bootstrap_high"]) == (1, 1)
        assert summary["low"] < 0.75
        assert summary["clusters"] == 10


class TestSignFlips:
    @given(st.lists(st.integers(-4, 4), max_size=9))
    def test_equals_all_sign_patterns(self, differences):
        steps = [d for d in differences if d]
        sums = [
            abs(sum(s * d for s, d in zip(signs, steps, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(steps))
        ]
        expected = sum(s >= abs(sum(steps)) for s in sums) / len(sums)
        assert sign_flip_p(differences) == pytest.approx(expected)

    @given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4))
    def test_is_mc_nemar_of_clusters_that_agree(self, gain, harm, size):
        differences = [size] * gain + [-size] * harm + [0] * 3
        assert sign_flip_p(differences) == pytest.approx(mcnemar_p(gain, harm), rel=1e-9)


class TestCompare:
    def test_gain_and_harm_by_category(self):
        a = rows([0, 0, 1, 1, 0, 1], category=lambda i: "ab"[i % 2])
        b = rows([1, 0, 1, 0, 1, 1], category=lambda i: "ab"[i % 2])
        result = compare(a, b)
        parts = result["by_category"]
        assert [(parts[c]["gain"], parts[c]["harm"], parts[c]["n"]) for c in "ab"] == [
            (2, 0, 3),
            (0, 1, 3),
        ]
        assert (result["gain"], result["harm"]) == (2, 1)
        assert parts["a"]["mcnemar_p"] == mcnemar_p(2, 0)
        assert "by_category" not in parts["a"]
        assert "clusters" not in result

    def test_rotations_that_change_together_are_one_change(self):
        """50 images in 4 rotations; all rotations of 10 improve, of 4 get worse."""
        before = [0] * 40 + [1] * 160
        after = [1] * 40 + [0] * 16 + [1] * 144
        image = lambda i: i // 4
        result = compare(rows(before, image_hash=image), rows(after, image_hash=image))
        alone = compare(rows(before), rows(after))
        assert result["clusters"] == 50
        assert (
            result["mcnemar_p"]
            == pytest.approx(mcnemar_p(10, 4))
            == pytest.approx(0.1796, abs=1e-4)
        )
        assert alone["mcnemar_p"] < 0.002
        fifty = paired_interval(10, 4, 50)
        assert result["high"] - result["low"] == pytest.approx(fifty[1] - fifty[0], rel=0.03)
        assert result["high"] - result["low"] > 1.8 * (alone["high"] - alone["low"])
        assert (result["bootstrap_low"], result["bootstrap_high"]) == pytest.approx(
            (-0.02, 0.26), abs=0.03
        )
        assert result["difference"] == alone["difference"]

    def test_the_other_side_may_know_the_images(self):
        a, b = rows([0, 1, 0, 0]), rows([1, 1, 1, 0], image_hash=lambda i: i // 2)
        assert compare(a, b)["clusters"] == 2

    def test_one_image_each_changes_nothing(self):
        plain = compare(rows([0, 1, 0]), rows([1, 1, 0]))
        images = compare(rows([0, 1, 0], image_hash=str), rows([1, 1, 0], image_hash=str))
        assert plain == images

    def test_samples_are_paired_by_number(self):
        a = [{"id": "q", "mode": "m", "sample": s, "correct": v} for s, v in enumerate([0, 1])]
        b = [{"id": "q", "mode": "m", "sample": s, "correct": v} for s, v in enumerate([1, 1, 1])]
        result = compare(a, b)
        assert (result["n"], result["gain"], result["harm"], result["only_b"]) == (2, 1, 0, 1)
        assert changes(a, b) == {("q", 0): "gain", ("q", 1): "both right"}

    def test_changes_by_answer(self):
        found = changes(rows([0, 0, 1, 1]), rows([0, 1, 0, 1]))
        assert list(found.values()) == ["both wrong", "gain", "harm", "both right"]

    def test_the_design_effect_covers(self):
        """Images of 4 questions whose difficulty is shared: intervals hold the true difference."""
        rng = np.random.default_rng(0)
        covered = {"low": 0, "alone": 0, "bootstrap_low": 0}
        image = lambda i: i // 4
        for _ in range(200):
            up = np.repeat(rng.random(40) < 0.3, 4) & (rng.random(160) < 0.8)
            down = ~up & (rng.random(160) < 0.1)
            a = (rng.random(160) < 0.5).astype(int)
            a[up], a[down] = 0, 1
            b = a.copy()
            b[up], b[down] = 1, 0
            truth = 0.24 - 0.76 * 0.1
            result = compare(rows(a.tolist(), image_hash=image), rows(b.tolist(), image_hash=image))
            alone = paired_interval(result["gain"], result["harm"], 160)
            covered["low"] += result["low"] <= truth <= result["high"]
            covered["alone"] += alone[0] <= truth <= alone[1]
            covered["bootstrap_low"] += result["bootstrap_low"] <= truth <= result["bootstrap_high"]
        assert 184 <= covered["low"] <= 199
        assert 180 <= covered["bootstrap_low"] <= 199
        assert covered["alone"] < 175  # What ignoring the images would claim.


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=30))
def test_a_design_effect_is_between_1_and_n(pairs):
    values, clusters = zip(*pairs, strict=True)
    assert 1 <= design_effect(values, clusters) <= len(values)


class TestSeveralAnswers:
    @pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (4, 0), (4, 1), (6, 2), (8, 8)])
    def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(self, n, right):
        verdicts = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(verdicts, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(expected)
            assert pass_at_k(n, right, k) == pytest.approx(
                1 - math.comb(n - right, k) / math.comb(n, k)
            )

    @pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
    def test_impossible_numbers_are_refused(self, arguments):
        with pytest.raises(ValueError, match="needs"):
            pass_at_k(*arguments)

    @pytest.mark.parametrize(
        "said, right",
        [
            ("BBA", 1),
            ("AAB", 0),
            ("AB", 0),
            ("BA", 1),
            ("ABB", 1),
            ("---", 0),
            ("-B-", 1),
            ("A-B", 0),
        ],
    )
    def test_the_majority(self, said, right):
        """B is the answer, - is none; of two as frequent the earlier one counts."""
        answers = [
            {"id": "q", "prediction": None if c == "-" else c, "correct": int(c == "B")}
            for c in said
        ]
        assert majority_verdict(answers) == right

    def test_figures_of_a_mode(self):
        said = {"q0": "BAAA", "q1": "AABA", "q2": "AAAA", "q3": "BB"}
        records = [
            {"id": q, "mode": "p2r", "sample": s, "prediction": c, "correct": int(c == "B")}
            for q, text in said.items()
            for s, c in enumerate(text)
        ][::-1]
        found = sampled_figures(records)
        assert found is not None
        assert (found["samples"], found["questions"], found["incomplete"]) == (4, 3, 1)
        assert list(found["pass"]) == list(found["maj"]) == ["1", "2", "4"]
        assert [s["accuracy"] for s in found["pass"].values()] == pytest.approx(
            [1 / 6, 1 / 3, 2 / 3]
        )
        assert [s["accuracy"] for s in found["maj"].values()] == pytest.approx([1 / 3, 1 / 3, 0])
        summary = summarize(records)
        assert summary["sampled"] == found
        assert summary["accuracy"] == pytest.approx(4 / 14)
        assert summary["clusters"] == 4

    def test_one_answer_each_is_not_sampled(self):
        assert sampled_figures(rows([0, 1], sample=lambda i: 0)) is None
        assert "sampled" not in summarize(rows([0, 1]))


class TestRotations:
    def make(self, verdicts, **fields):
        return rows(
            verdicts,
            cluster=lambda i: f"q{i // 4}",
            meta=lambda i: {"cycle_category": "wxyz"[i % 4]},
            **fields,
        )

    def test_mean_of_means_and_strict(self):
        summary = summarize(self.make([1, 1, 1, 1, 1, 0, 0, 0]))
        means = summary["rotations"]["by_rotation"]
        assert {k: m["accuracy"] for k, m in means.items()} == {
            "w": 1,
            "x": 0.5,
            "y": 0.5,
            "z": 0.5,
        }
        assert summary["rotations"]["mean"] == pytest.approx(0.625)
        assert summary["all_rotations"]["accuracy"] == 0.5
        assert summary["all_rotations"]["incomplete"] == 0

    def test_a_question_cut_short_is_not_right_in_every_rotation(self):
        summary = summarize(self.make([1, 1, 1, 1, 1, 1]))
        assert summary["accuracy"] == 1
        assert summary["all_rotations"]["n"] == 1
        assert summary["all_rotations"]["incomplete"] == 1

    def test_rotations_of_unequal_number_weigh_the_same(self):
        summary = summarize(self.make([1, 0, 0, 0, 1]))
        assert summary["rotations"]["mean"] == pytest.approx(0.25)
        assert summary["accuracy"] == pytest.approx(0.4)
