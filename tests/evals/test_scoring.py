"""Counting: intervals against published and SciPy values, hits, summaries, paired tests."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from p2r_jax.evals import intervals, scoring
from p2r_jax.evals.scoring import Accuracy, compare, format_table, hit, summarize, wilson_interval

stats = pytest.importorskip("scipy.stats")


def record(id_: Any, correct: int = 1, **fields: Any) -> dict[str, Any]:
    defaults = {"mode": "p2r", "category": "a", "prediction": "A", "perceiver_text": "[]"}
    return {"id": id_, "correct": correct, "boxes": [], "parse_ok": True, **defaults, **fields}


class TestIntervals:
    def test_wilson_of_the_published_v_star_result(self):
        low, high = wilson_interval(178, 191)
        assert (round(100 * low, 1), round(100 * high, 1)) == (88.7, 96.0)

    @pytest.mark.parametrize("n", [1, 2, 7, 191, 800, 3000])
    @pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
    def test_wilson_equals_scipy(self, n, confidence):
        for successes in {0, 1, n // 3, n - 1, n}:
            reference = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
            assert wilson_interval(successes, n, confidence) == pytest.approx(reference, abs=1e-12)

    def test_nothing_counted_means_anything_is_possible(self):
        assert wilson_interval(0, 0) == (0.0, 1.0)
        assert Accuracy.of([]) == Accuracy(None, 0.0, 1.0, 0)
        assert str(Accuracy.of([])) == "- (n=0)"

    def test_limits_are_exact_at_the_ends(self):
        assert wilson_interval(0, 50)[0] == 0.0
        assert wilson_interval(50, 50)[1] == 1.0

    @pytest.mark.parametrize("arguments", [(-1, 5), (6, 5), (1, -1), (1, 5, 1.0), (1, 5, 0.0)])
    def test_impossible_counts_are_refused(self, arguments):
        with pytest.raises(ValueError, match=r"successes|confidence"):
            wilson_interval(*arguments)

    def test_accuracy_reads_as_one_line(self):
        assert str(Accuracy.of([1] * 178 + [0] * 13)) == "93.2 % [88.7-96.0] (n=191)"

    @pytest.mark.parametrize(
        "gain, harm", [(0, 0), (1, 0), (10, 2), (3, 40), (600, 700), (2000, 0)]
    )
    def test_mcnemar_equals_a_binomial_test(self, gain, harm):
        expected = stats.binomtest(gain, gain + harm).pvalue if gain + harm else 1.0
        assert intervals.mcnemar_p(gain, harm) == pytest.approx(expected, rel=1e-9)

    def test_paired_interval_by_hand(self):
        # 1 of 21 children changed one way, 7 the other: (2 - 8) / 23 -+ 1.96 * 0.1263.
        low, high = intervals.paired_interval(gain=1, harm=7, n=21)
        assert (low, high) == pytest.approx((-0.508, -0.013), abs=1e-3)

    def test_paired_interval_covers_the_true_difference(self):
        rng = random.Random(0)
        p_gain, p_harm, n, trials, covered = 0.2, 0.08, 100, 2000, 0
        for _ in range(trials):
            draws = [rng.random() for _ in range(n)]
            gain = sum(d < p_gain for d in draws)
            harm = sum(p_gain <= d < p_gain + p_harm for d in draws)
            low, high = intervals.paired_interval(gain, harm, n)
            covered += low <= p_gain - p_harm <= high
        assert 0.935 < covered / trials < 0.975

    def test_rotations_that_always_agree_count_as_one_question(self):
        correct = [v for v in [1, 0] * 50 for _ in range(4)]
        clusters = [i // 4 for i in range(400)]
        clustered, independent = Accuracy.of(correct, clusters), Accuracy.of([1, 0] * 50)
        assert clustered.accuracy == independent.accuracy
        assert clustered.n == 400
        width = clustered.high - clustered.low
        assert width == pytest.approx(independent.high - independent.low, rel=0.01)

    def test_clusters_never_narrow_the_interval(self):
        correct = [1, 0] * 50  # Every cluster holds one of each: less spread than chance.
        assert Accuracy.of(correct, [i // 2 for i in range(100)]) == Accuracy.of(correct)

    def test_clusters_widen_a_perfect_score_too(self):
        perfect = Accuracy.of([1] * 40, [i // 4 for i in range(40)])
        assert (perfect.low, perfect.high) == wilson_interval(10, 10)


class TestHit:
    true = ((480, 480, 520, 520),)

    def test_a_close_crop_around_the_truth_is_a_hit(self):
        assert hit([(470, 470, 530, 530)], self.true, 1000, 1000) is True

    def test_padding_forgives_a_box_that_is_a_little_off(self):
        assert hit([(540, 480, 580, 520)], self.true, 1000, 1000) is True
        assert hit([(585, 480, 625, 520)], self.true, 1000, 1000) is False

    def test_padding_is_600_pixels_at_most(self):
        box = (540, 480, 580, 520)
        assert hit([box], self.true, 12_000, 1000) is False

    def test_a_giant_box_is_no_hit(self):
        assert hit([(0, 0, 1000, 1000)], self.true, 1000, 1000) is False
        assert hit([(0, 0, 1000, 1000)], self.true, 1000, 1000, max_area=1.0) is True

    def test_the_limit_is_on_the_padded_crop(self):
        assert hit([(360, 360, 640, 640)], self.true, 1000, 1000) is True  # 0.48 x 0.48 padded
        assert hit([(340, 340, 660, 660)], self.true, 1000, 1000) is False

    def test_every_true_box_needs_a_crop_but_not_the_same_one(self):
        both = [*self.true, (100, 100, 130, 130)]
        assert hit([(470, 470, 530, 530)], both, 1000, 1000) is False
        assert hit([(470, 470, 530, 530), (90, 90, 140, 140)], both, 1000, 1000) is True

    def test_boxes_after_the_third_are_not_cropped(self):
        far = [(0, 0, 20, 20)] * 3
        assert hit([*far, (470, 470, 530, 530)], self.true, 1000, 1000) is False

    def test_a_true_box_split_over_two_crops_is_a_miss(self):
        wide = [(300, 480, 700, 520)]
        assert hit([(300, 480, 500, 520), (500, 480, 700, 520)], wide, 1000, 1000) is False

    def test_whole_pixel_corners_do_not_turn_a_hit_into_a_miss(self):
        # 997 pixels wide: the crop's corners are rounded down, the true box's are not.
        assert hit([(0, 0, 300, 300)], [(0, 0, 400, 400)], 997, 997) is True

    def test_without_boxes(self):
        assert hit([], self.true, 1000, 1000) is False
        assert hit([(470, 470, 530, 530)], [], 1000, 1000) is None

    def test_figures_of_a_record(self):
        figures = scoring.box_figures([(0, 0, 100, 100), (480, 480, 520, 520)], self.true, 640, 480)
        assert figures["hit"] is True
        assert figures["iou"] == pytest.approx(1.0)
        assert figures["area"] == pytest.approx((0.01 + 0.0016) / 2)
        assert scoring.box_figures([], self.true, 640, 480) == {
            "hit": False,
            "iou": 0.0,
            "area": None,
        }
        assert scoring.box_figures([], [], 640, 480)["iou"] is None


class TestSummarize:
    def test_overall_and_categories(self):
        records = [record(i, int(i % 4 > 0), category="ab"[i % 2]) for i in range(40)]
        summary = summarize(records)
        assert (summary["accuracy"], summary["n"]) == (0.75, 40)
        assert (summary["low"], summary["high"]) == wilson_interval(30, 40)
        assert summary["by_category"]["a"]["accuracy"] == 0.5
        assert summary["by_category"]["b"] == {
            "accuracy": 1.0,
            "low": wilson_interval(20, 20)[0],
            "high": 1.0,
            "n": 20,
        }
        assert "all_rotations" not in summary

    def test_perceiver_figures(self):
        def boxes(*corners, label="cup"):
            return [{"bbox_2d": list(c), "label": label} for c in corners]

        records = [
            record(0, boxes=boxes((0, 0, 100, 100)), hit=True, iou=0.8, area=0.01),
            record(
                1, boxes=boxes((0, 0, 100, 100), (0, 0, 100, 90)), hit=False, iou=0.2, area=0.03
            ),
            record(2, boxes=boxes((5, 5, 9, 9), label="description"), hit=None, area=0.02),
            record(3, 0, parse_ok=False, hit=False, iou=0.0, area=None, prediction=None),
        ]
        summary = summarize(records)
        assert summary["answer_parse_failure_rate"] == 0.25
        assert (summary["hit_rate"], summary["hit_n"]) == (pytest.approx(1 / 3), 3)
        assert (summary["hit_low"], summary["hit_high"]) == wilson_interval(1, 3)
        assert summary["mean_iou"] == pytest.approx(1 / 3)
        assert summary["mean_area"] == pytest.approx(0.02)
        assert summary["boxes_per_sample"] == 1.0
        assert summary["parse_ok_rate"] == 0.75
        assert summary["empty_rate"] == 0.25
        assert summary["overlap_penalty_rate"] == 0.25
        assert summary["label_penalty_rate"] == 0.25

    def test_modes_without_a_perceiver_have_no_perceiver_figures(self):
        plain = summarize([record(0, mode="default", perceiver_text=None, parse_ok=None)])
        assert plain["hit_rate"] is plain["empty_rate"] is plain["boxes_per_sample"] is None
        oracle = summarize(
            [
                record(
                    0,
                    mode="oracle_box",
                    perceiver_text=None,
                    boxes=[{"bbox_2d": [0, 0, 9, 9], "label": "x"}],
                    hit=True,
                )
            ]
        )
        assert (oracle["hit_rate"], oracle["parse_ok_rate"]) == (1.0, None)

    def test_no_records(self):
        summary = summarize([])
        assert (summary["accuracy"], summary["n"], summary["by_category"]) == (None, 0, {})

    def test_summaries_are_json(self, finished_run):
        lines = (finished_run / "eval/after.jsonl").read_text().splitlines()
        summary = scoring.summarize_modes("after", map(json.loads, lines))
        assert list(summary["modes"]) == ["default", "p2r"]
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary

    def test_rotations_give_strict_accuracy_and_a_wider_interval(self):
        # 50 questions in 4 rotations; 20 always right, 20 always wrong, 10 half right.
        verdicts = [[1] * 4] * 20 + [[0] * 4] * 20 + [[1, 1, 0, 0]] * 10
        records = [
            record(f"{q}-{r}", v, cluster=q)
            for q, vs in enumerate(verdicts)
            for r, v in enumerate(vs)
        ]
        summary = summarize(records)
        assert summary["accuracy"] == 0.5
        assert summary["all_rotations"]["accuracy"] == 0.4
        assert summary["all_rotations"]["n"] == 50
        low, high = wilson_interval(100, 200)
        assert summary["high"] - summary["low"] > 1.5 * (high - low)

    def test_modes_must_not_be_mixed(self):
        with pytest.raises(ValueError, match=r"\['default', 'p2r'\].*by_mode"):
            summarize([record(0), record(1, mode="default")])

    def test_a_record_without_a_verdict_is_never_counted_as_wrong(self):
        with pytest.raises(ValueError, match=r"'q7'.*correct.*None"):
            summarize([{**record("q7"), "correct": None}])


class TestCompare:
    def test_counts_by_hand(self):
        a = [record(i, int(i < 10)) for i in range(20)]
        b = [record(i, int(i >= 2 and i < 15)) for i in range(20)]
        result = compare(a, b)
        assert (result["gain"], result["harm"], result["n"]) == (5, 2, 20)
        assert (result["accuracy_a"], result["accuracy_b"]) == (0.5, 0.65)
        assert result["difference"] == pytest.approx(0.15)
        assert result["low"] < 0.15 < result["high"]
        assert result["mcnemar_p"] == pytest.approx(stats.binomtest(5, 7).pvalue)

    def test_swapping_sides_swaps_signs(self):
        rng = random.Random(1)
        a = [record(i, rng.randint(0, 1)) for i in range(60)]
        b = [record(i, rng.randint(0, 1)) for i in range(60)]
        forth, back = compare(a, b), compare(b, a)
        assert (forth["gain"], forth["low"]) == (back["harm"], pytest.approx(-back["high"]))
        assert forth["mcnemar_p"] == back["mcnemar_p"]

    def test_only_shared_questions_count(self):
        result = compare([record(i, 0) for i in range(5)], [record(i, 1) for i in range(3, 10)])
        assert (result["n"], result["only_a"], result["only_b"], result["gain"]) == (2, 3, 5, 2)

    def test_identical_runs_show_no_difference(self):
        same = [record(i, i % 2) for i in range(30)]
        result = compare(same, same)
        assert (result["difference"], result["mcnemar_p"]) == (0.0, 1.0)
        assert math.isclose(result["low"], -result["high"])

    def test_what_cannot_be_paired_is_refused(self):
        with pytest.raises(ValueError, match="repeats on side b"):
            compare([record(1)], [record(1), record(1, mode="default")])
        with pytest.raises(ValueError, match="different questions"):
            compare([record(1)], [record(2)])


class TestTable:
    def test_columns_line_up(self):
        table = format_table(
            [
                {"run": "before", "n": 191, "accuracy": 0.5},
                {"run": "after a while", "n": 7, "p": None},
            ]
        )
        assert table.splitlines() == [
            "run              n  accuracy  p",
            "-------------  ---  --------  -",
            "before         191     0.500  -",
            "after a while    7         -  -",
        ]

    def test_a_summary_prints_with_its_intervals(self):
        records = [record(i, int(i % 4 > 0), category="ab"[i % 2]) for i in range(40)]
        rows = scoring.summary_rows({"p2r": summarize(records)})
        assert [row["category"] for row in rows] == ["all", "a", "b"]
        assert "75.0  59.8 - 85.8" in format_table(rows)

    def test_cells_stay_on_one_line(self):
        assert format_table([{"a": "x\ny"}]).splitlines()[-1] == "x y"

    def test_no_rows(self):
        assert format_table([]) == "(no rows)"
