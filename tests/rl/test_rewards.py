"""What a completion earns: the answer's grade, unless the boxes break a rule (P2R §1)."""

from __future__ import annotations

import json

import pytest

from p2r_jax.config import RewardConfig
from p2r_jax.data.rows import Row
from p2r_jax.rl.experience import answer_to
from p2r_jax.rl.rewards import perceiver_reward, reasoner_reward
from p2r_jax.roles.boxes import parse_response
from p2r_jax.roles.grading import Grader


def written(*boxes: tuple[list[float], str]) -> str:
    return json.dumps([{"bbox_2d": corners, "label": label} for corners, label in boxes])


ONE = written(([100, 100, 300, 300], "cup"))
APART = written(([100, 100, 300, 300], "cup"), ([600, 600, 800, 800], "dog"))
OVERLAPPING = written(([100, 100, 300, 300], "cup"), ([100, 100, 300, 310], "mug"))
UNLABELLED = written(([100, 100, 300, 300], ""))
PLACEHOLDER = written(([100, 100, 300, 300], "description"))
# Penalties look at all boxes, also those that are not cropped.
LATE_OVERLAP = written(
    *[([k * 200, 0, k * 200 + 100, 100], "cup") for k in range(4)], ([600, 0, 700, 99], "dog")
)


class TestPerceiver:
    @pytest.mark.parametrize("text", [ONE, APART, "[]", "no boxes at all"])
    @pytest.mark.parametrize("grade", [0.0, 1.0])
    def test_earns_what_the_reasoner_answered(self, text, grade):
        assert perceiver_reward(parse_response(text), grade).value == grade

    @pytest.mark.parametrize("text", [OVERLAPPING, UNLABELLED, PLACEHOLDER, LATE_OVERLAP])
    @pytest.mark.parametrize("grade", [0.0, 1.0, None])
    def test_earns_nothing_with_boxes_that_break_a_rule(self, text, grade):
        """Whatever the answer, and even if it could not be graded."""
        assert perceiver_reward(parse_response(text), grade).value == 0.0

    def test_is_dropped_if_the_answer_could_not_be_graded(self):
        reward = perceiver_reward(parse_response(ONE), None)
        assert reward.value is None
        assert "answer" not in reward.parts

    @pytest.mark.parametrize(
        "text, rule", [(OVERLAPPING, "overlap"), (UNLABELLED, "label"), (PLACEHOLDER, "label")]
    )
    def test_a_rule_may_be_left_out_and_its_breaches_are_told_all_the_same(self, text, rule):
        for name in ("overlap", "label"):
            rules = RewardConfig(**{f"{name}_penalty": False})
            reward = perceiver_reward(parse_response(text), 1.0, rules)
            assert reward.value == (1.0 if name == rule else 0.0)
            assert reward.parts[f"{rule}_penalty"] == 1

    def test_parts_say_which_rule(self):
        parts = {
            name: perceiver_reward(parse_response(text), 1.0).parts
            for name, text in (("iou", OVERLAPPING), ("label", UNLABELLED), ("none", "gibberish"))
        }
        assert (parts["iou"]["overlap_penalty"], parts["iou"]["label_penalty"]) == (1, 0)
        assert (parts["label"]["overlap_penalty"], parts["label"]["label_penalty"]) == (0, 1)
        assert (parts["none"]["parse_ok"], parts["none"]["empty"]) == (0, 1)
        assert parts["iou"]["answer"] == 1.0


class TestReasoner:
    @pytest.mark.parametrize("grade", [0.0, 1.0, None])
    def test_earns_its_own_grade(self, grade):
        assert reasoner_reward("<answer>A</answer>", grade).value == grade

    def test_parts_say_whether_there_was_a_tag(self):
        assert reasoner_reward("<answer>A</answer>", 1.0).parts["answer_tag"] == 1
        assert reasoner_reward("A", 1.0).parts["answer_tag"] == 0


def graded(row: Row, response: str, require_tag: bool = False) -> float | None:
    (grade,) = Grader().grade([answer_to(row, response, require_tag)])
    return grade


def make_row(options: int, answer: str, form: str = "mca") -> Row:
    texts = tuple(f"option {i}" for i in range(options))
    return Row("1", "Which?", answer, form, options=texts, image_source=b"")


class TestLettersOfTraining:
    """A to E as the authors have it, and as many as a row has options."""

    @pytest.mark.parametrize(
        "options, answer, response, reward",
        [
            (4, "B", "<answer>B</answer>", 1.0),
            (4, "B", "<answer>E or B</answer>", 0.0),
            (7, "F", "<answer>F</answer>", 1.0),
            (7, "F", "<answer>G</answer>", 0.0),
            (0, "F", "<answer>F</answer>", 1.0),
        ],
    )
    def test_a_right_answer_is_never_out_of_reach(self, options, answer, response, reward):
        assert graded(make_row(options, answer), response) == reward


class TestAnswerTags:
    """Training takes an answer without its tag, as the authors do, unless it is set to refuse."""

    @pytest.mark.parametrize(
        "row, tagged, bare",
        [
            (make_row(4, "B"), "so <answer>B</answer>", "B"),
            (make_row(0, "12", "na"), "so <answer>12</answer>", "12"),
        ],
        ids=lambda x: x.answer_form if isinstance(x, Row) else "",
    )
    def test_may_be_required(self, row, tagged, bare):
        assert RewardConfig().require_answer_tag is False
        assert graded(row, tagged) == graded(row, bare) == 1.0
        assert graded(row, tagged, require_tag=True) == 1.0
        assert graded(row, bare, require_tag=True) == 0.0
