"""What a completion earns: the answer's grade, unless the boxes break a rule (P2R §1)."""

from __future__ import annotations

import json

import pytest

from p2r_jax.config import RewardConfig
from p2r_jax.data.rows import Row
from p2r_jax.rl.rewards import Grades, perceiver_reward, reasoner_reward
from p2r_jax.roles.answers import AnswerRule, answer_to, unit
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


def graded(row: Row, response: str, rule: AnswerRule = "evaluation") -> float | None:
    (grade,) = Grader().grade([answer_to(row, response, rule)])
    return grade


def make_row(options: int, answer: str, form: str = "mca") -> Row:
    texts = tuple(f"option {i}" for i in range(options))
    return Row("1", "Which?", answer, form, options=texts, image_source=b"")


@pytest.mark.parametrize(
    "options, answer, response, authors, evaluation",
    [
        (4, "B", "<answer>B</answer>", 1.0, 1.0),
        (4, "B", "<answer>E or B</answer>", 0.0, 1.0),
        (7, "F", "<answer>F</answer>", 1.0, 1.0),
        (7, "F", "<answer>G</answer>", 0.0, 0.0),
        (0, "F", "<answer>F</answer>", 1.0, 1.0),
        (4, "B", "B", 1.0, 0.0),
        (4, "B", "<answer>B", 1.0, 0.0),
        (4, "B", "<answer>B</answer> or C", 1.0, 1.0),
        (4, "B", "<answer>C</answer><answer>B</answer>", 0.0, 0.0),
    ],
)
def test_the_authors_rule_is_laxer_about_tags_and_knows_five_letters(
    options, answer, response, authors, evaluation
):
    row = make_row(options, answer)
    assert graded(row, response, "authors") == authors
    assert graded(row, response) == evaluation


@pytest.mark.parametrize("form, truth", [("mca", "B"), ("na", "12")])
def test_only_a_closed_tag_is_an_answer_unless_the_authors_rule_is_asked_for(form, truth):
    assert RewardConfig().answer_rule == "evaluation"
    row = make_row(4 if form == "mca" else 0, truth, form)
    assert graded(row, f"so <answer>{truth}</answer>") == 1.0
    assert graded(row, truth) == 0.0
    assert graded(row, truth, "authors") == 1.0


HACKS = [
    "<think>P</think><answer>C,P</think><answer>C,P",
    "<think>P</think><answer>C,P</think><answer>C,P</think><answer>C,P",
    "<think>C</think><answer>C",
    "C",
]
"""Completions of a run that collapsed: rewarded 1 by the authors' rule, 0 in its evaluations."""


class TestRulesThatDisagree:
    @pytest.mark.parametrize("response", HACKS)
    def test_a_hack_of_the_authors_rule_earns_nothing_and_is_counted_under_it(self, response):
        row = make_row(4, "C")
        evaluation, authors = graded(row, response), graded(row, response, "authors")
        own = reasoner_reward(response, Grades(evaluation, evaluation))
        lax = reasoner_reward(response, Grades(authors, evaluation))
        assert (own.value, own.parts["only_training"]) == (0.0, 0.0)
        assert (lax.value, lax.parts["only_training"]) == (1.0, 1.0)
        assert lax.parts["only_evaluation"] == 0.0

    def test_answers_that_only_the_evaluation_takes_are_counted_too(self):
        """E is no option of a question that has four; to the authors' rule it is one."""
        response, row = "<answer>E or B</answer>", make_row(4, "B")
        grades = Grades(graded(row, response, "authors"), graded(row, response))
        parts = reasoner_reward(response, grades).parts
        assert (parts["only_training"], parts["only_evaluation"]) == (0.0, 1.0)

    def test_a_perceivers_reward_counts_the_answers_of_its_partner(self):
        reward = perceiver_reward(parse_response(ONE), Grades(1.0, 0.0))
        assert (reward.value, reward.parts["only_training"]) == (1.0, 1.0)

    def test_what_could_not_be_graded_is_in_neither_count(self):
        assert "only_training" not in reasoner_reward("x", Grades(None, None)).parts

    @pytest.mark.parametrize(
        "form, truth", [("mca", "B"), ("na", "12"), ("free_form", "a red cup")]
    )
    def test_the_second_rule_asks_nobody_anything_about_a_tagged_answer(self, form, truth):
        """Both rules settle the same thing then, so that a judge is asked once."""
        row = make_row(5 if form == "mca" else 0, truth, form)
        response = f"<answer>{truth}</answer>"
        rules = ("authors", "evaluation")
        assert len({unit(answer_to(row, response, rule)) for rule in rules}) == 1
