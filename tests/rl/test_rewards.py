"""What a completion earns: the answer's grade, unless the boxes break a rule (P2R §1)."""

from __future__ import annotations

import json

import pytest

from p2r_jax.data.rows import Row
from p2r_jax.rl.experience import grader
from p2r_jax.rl.rewards import perceiver_reward, reasoner_reward
from p2r_jax.roles.boxes import parse_response


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
        texts = tuple(f"option {i}" for i in range(options))
        row = Row("1", "Which?", answer, "mca", options=texts, image_source=b"")
        assert grader(None)(row, response) == reward
