"""What is a right answer, what is a wrong one, and what cannot be graded."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r_jax.roles import answers as rewards
from p2r_jax.roles.answers import (
    answer_reward,
    choice_letter,
    choice_reward,
    extract_answer,
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

    def grade():
        try:
            number_reward("42", "42")
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "main thread" in errors[0]


# --- free text --------------------------------------------------------------------------------


def ask(verifier, response="<answer>a red cup</answer>", **options):
    return answer_reward(
        response, "red mug", "free_form", verifier,
        question="What is it?", retry_wait_seconds=0.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("verdict", [True, False])
def test_a_verifier_judges_the_extracted_answer(verdict):
    seen = []

    def verifier(question, answer, response):
        seen.append((question, answer, response))
        return verdict

    assert ask(verifier) == float(verdict)
    assert seen == [("What is it?", "red mug", "a red cup")]


def failing(times):
    calls = []

    def verifier(question, answer, response):
        calls.append(response)
        if len(calls) <= times:
            raise ConnectionError("no route")
        return True

    return verifier, calls


def test_a_failing_verifier_is_asked_again():
    verifier, calls = failing(times=2)
    assert ask(verifier, attempts=3) == 1.0
    assert len(calls) == 3


def test_a_verifier_that_keeps_failing_drops_the_sample_instead_of_scoring_it_0():
    verifier, calls = failing(times=99)
    assert ask(verifier, attempts=3) is None
    assert len(calls) == 3


def test_a_verdict_that_is_not_a_bool_is_a_failure():
    assert ask(lambda question, answer, response: "no") is None


def test_retries_wait_longer_each_time(monkeypatch):
    waits = []
    monkeypatch.setattr(rewards.time, "sleep", waits.append)
    verifier, _ = failing(times=99)
    answer_reward("x", "y", "free_form", verifier, attempts=4, retry_wait_seconds=2.0)
    assert waits == [2.0, 4.0, 8.0]


def test_evaluation_does_not_bother_the_verifier_without_a_tag():
    verifier, calls = failing(times=0)
    assert ask(verifier, response="a red cup", require_tag=True) == 0.0
    assert not calls


# --- by answer form ---------------------------------------------------------------------------


def test_the_answer_form_picks_the_grader():
    assert answer_reward("<answer>B</answer>", "b", "mca") == 1.0
    assert answer_reward("<answer>2.0</answer>", "2", "na") == 1.0
    assert answer_reward("<answer>2.0</answer>", "two", "na") is None


def test_data_that_cannot_be_graded_is_refused_before_training():
    require_verifier(["mca", "na"], None)
    require_verifier(["mca", "free_form"], lambda question, answer, response: True)
    with pytest.raises(ValueError, match="'free_form', which only a verifier can grade"):
        require_verifier(["mca", "free_form"], None)
    with pytest.raises(ValueError, match="answer_form 'essay' cannot be graded"):
        require_verifier(["mca", "essay"], None)
    with pytest.raises(ValueError, match="verifier"):
        answer_reward("x", "y", "free_form")
