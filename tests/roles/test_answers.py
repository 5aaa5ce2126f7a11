"""What is a right answer, what is a wrong one, and what cannot be graded."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r_jax.roles.answers import (
    Answer,
    Query,
    choice_letter,
    choice_reward,
    extract_answer,
    grade,
    has_answer_tag,
    number_reward,
    require_verifier,
)

CHOICES = json.loads((Path(__file__).parents[1] / "golden" / "choice_reward.json").read_text())


# --- the answer in a completion ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer", "tagged"),
    [
        ("<think>B?</think><answer> A </answer>", "A", True),
        ("<answer>A</answer><answer>B</answer>", "A", True),
        ("<answer>two\nlines</answer>", "two\nlines", True),
        ("<answer></answer>", "", True),
        (" A \n", "A", False),
        ("<answer>A", "<answer>A", False),
        ("A</answer>", "A</answer>", False),
        ("</answer>A<answer>", "</answer>A<answer>", False),
        ("", "", False),
    ],
)
def test_the_answer_is_in_the_first_closed_tag_or_else_the_whole_text(response, answer, tagged):
    assert extract_answer(response) == answer
    assert has_answer_tag(response) == tagged


# --- option letters ---------------------------------------------------------------------------


def test_choice_rewards_equal_the_authors():
    for case in CHOICES:
        assert extract_answer(case["response"]) == case["extracted"]
        assert choice_reward(case["response"], case["ground_truth"]) == case["reward"], case


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("The best answer is B", "B"),
        ("Answer: C", "C"),  # not the A of "Answer"
        ("Best option: D", "D"),  # not the B of "Best"
        ("(e) E.", "E"),
        ("Based on it, C", "B"),  # any capital counts
        ("the red one", ""),
        ("F", ""),
    ],
)
def test_the_choice_is_the_first_option_capital_after_lead_ins(answer, letter):
    assert choice_letter(answer) == letter


def test_the_options_depend_on_the_benchmark():
    assert choice_reward("E", "E") == 1.0
    assert choice_reward("E", "E", letters="ABCD") == 0.0
    assert choice_reward("F", "F", letters="ABCDEF") == 1.0
    assert choice_letter("E or D", letters="ABCD") == "D"


def test_evaluation_counts_an_answer_outside_the_tag_as_wrong():
    assert choice_reward("A", "A", require_tag=True) == 0.0
    assert choice_reward("<answer>A</answer>", "A", require_tag=True) == 1.0


def test_no_choice_is_wrong_even_if_the_row_lost_its_ground_truth():
    assert choice_reward("no idea", "") == 0.0


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ground_truth"),
    [
        ("42", "42"),
        ("42.0", "42"),
        ("3.10", "3.1"),
        ("1,234", "1234"),
        ("1/2", "0.5"),
        ("50%", "0.5"),
        ("$5", "5"),
        ("5 cm", "5"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("1e6", "1000000"),
        ("-3", "\N{MINUS SIGN}3"),
        ("There are 12 cups.", "12"),
        ("6 + 7 = 13", "13"),
    ],
)
def test_numbers_are_equal_in_value_not_in_spelling(answer, ground_truth):
    assert number_reward(f"<answer>{answer}</answer>", ground_truth) == 1.0


@pytest.mark.parametrize("answer", ["41", "", "many", "forty-two", "42 or 43", "((((", "x", "1/0"])
def test_a_wrong_or_unreadable_number_is_wrong(answer):
    assert number_reward(f"<answer>{answer}</answer>", "42") == 0.0


def test_a_ground_truth_without_a_number_cannot_be_graded():
    assert number_reward("<answer>42</answer>", "many") is None
    assert number_reward("<answer>42</answer>", "") is None


def test_a_number_outside_the_tag_counts_in_training_only():
    assert number_reward("It is 42.", "42") == 1.0
    assert number_reward("It is 42.", "42", require_tag=True) == 0.0


def test_an_answer_that_would_compute_forever_is_wrong():
    start = time.monotonic()
    assert number_reward("<answer>9**9**9**9</answer>", "9") == 0.0
    assert time.monotonic() - start < 10


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from("0123456789+-*/^%.,eE()[]{}$\\ x=<>\n"), max_size=30))
def test_whatever_the_answer_it_is_right_or_wrong(answer):
    assert number_reward(f"<answer>{answer}</answer>", "42") in (0.0, 1.0)


def test_grading_numbers_outside_the_main_thread_is_refused_at_once():
    errors = []

    def in_thread():
        try:
            number_reward("42", "42")
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "main thread" in errors[0]


# --- free text --------------------------------------------------------------------------------


class Script:
    """A verifier with a verdict for each response; keeps the queries of each call."""

    collective = False

    def __init__(self, **verdicts):
        self.verdicts = verdicts
        self.calls = []

    def __call__(self, queries):
        self.calls.append(list(queries))
        return [self.verdicts.get(query.response) for query in queries]


def free(response, **options):
    return Answer(response, "red mug", "free_form", "What is it?", **options)


def test_a_verifier_judges_the_extracted_answers_in_one_call():
    verifier = Script(cup=True, dog=False)
    answers = [
        free("<think>a dog?</think><answer> cup </answer>"),
        free("<answer>dog</answer>"),
        free("cup"),
    ]
    assert grade(answers, verifier) == [1.0, 0.0, 1.0]
    # The third is the same query as the first, however it was written.
    expected = [Query("What is it?", "red mug", response) for response in ("cup", "dog")]
    assert verifier.calls == [expected]


def test_queries_differ_by_question_and_truth_too():
    verifier = Script(cup=True)
    answers = [Answer("cup", truth, "free_form", q) for q in "ab" for truth in ("x", "y")]
    assert grade(answers, verifier) == [1.0] * 4
    assert len(verifier.calls[0]) == 4


def test_what_the_verifier_cannot_judge_is_dropped_instead_of_scored_0():
    assert grade([free("cup"), free("cat")], Script(cup=True)) == [1.0, None]


def test_evaluation_does_not_bother_the_verifier_without_a_tag():
    verifier = Script(cup=True)
    answers = [free("cup", require_tag=True), free("<answer>cup</answer>", require_tag=True)]
    assert grade(answers, verifier) == [0.0, 1.0]
    assert verifier.calls == [[Query("What is it?", "red mug", "cup")]]


@pytest.mark.parametrize(
    ("verdicts", "complaint"),
    [([True], "1 for 2 queries"), ([True, "no"], "'no', neither a bool nor None"), ([0, 1], "0, ")],
)
def test_a_verifier_that_breaks_its_contract_is_no_judge(verdicts, complaint):
    def verifier(queries):
        return verdicts

    with pytest.raises(TypeError, match=complaint):
        grade([free("cup"), free("cat")], verifier)


# --- by answer form ---------------------------------------------------------------------------


def test_the_answer_form_picks_the_grader_and_order_is_kept():
    verifier = Script(cup=True, dog=False)
    answers = [
        free("dog"),
        Answer("<answer>B</answer>", "b", "mca"),
        Answer("<answer>2.0</answer>", "2", "na"),
        free("cup"),
        Answer("<answer>2.0</answer>", "two", "na"),
        Answer("<answer>F</answer>", "F", "mca"),
        Answer("<answer>F</answer>", "F", "mca", letters="ABCDEF"),
        Answer("B", "B", "mca", require_tag=True),
        Answer("2", "2", "na", require_tag=True),
        Answer("2", "two", "na", require_tag=True),
    ]
    assert grade(answers, verifier) == [0.0, 1.0, 1.0, 1.0, None, 0.0, 1.0, 0.0, 0.0, None]
    assert len(verifier.calls) == 1


def test_a_verifier_without_work_is_not_called():
    verifier = Script()
    assert grade([Answer("B", "B", "mca"), free("x", require_tag=True)], verifier) == [1.0, 0.0]
    assert grade([], verifier) == []
    assert verifier.calls == []


def test_data_that_cannot_be_graded_is_refused_before_training():
    require_verifier(["mca", "na"], None)
    require_verifier(["mca", "free_form"], Script())
    with pytest.raises(ValueError, match="'free_form', which only a verifier can grade"):
        require_verifier(["mca", "free_form"], None)
    with pytest.raises(ValueError, match="answer_form 'essay' cannot be graded"):
        require_verifier(["mca", "essay"], None)
    with pytest.raises(ValueError, match="verifier"):
        grade([free("x")], None)
    with pytest.raises(ValueError, match="'essay'"):
        grade([Answer("x", "y", "essay")], Script())
