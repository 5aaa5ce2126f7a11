"""Which option each of three rules reads: the table of the module, recorded answers, any text."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2r_jax.evals import records
from p2r_jax.evals.answer_rules import RULES, authors, lmms_eval, options_in, vlmevalkit

COLORS = ["red", "blue", "green", "dark brown"]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/choice_reward.json").read_text())
FORMS = ("vstar", "hrbench", "mme_realworld", "training")


def three(response: str, form="vstar", options=COLORS) -> tuple[str | None, ...]:
    return tuple(rule(response, options, len(options), form) for rule in RULES.values())


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("blue", (None, "B", "B")),
        ("b", (None, "B", None)),
        ("Answer: b", (None, "A", None)),
        ("dark brown", (None, "D", "D")),
    ],
)
def test_the_same_answer_has_three_verdicts(answer, expected):
    assert three(answer) == expected
    assert three(f"<think>A, B, C or D</think><answer>{answer}</answer>") == expected


def test_rules_are_told_apart_by_name_the_authors_first():
    assert next(iter(RULES.items())) == ("authors", authors)
    assert set(RULES) == {"authors", "lmms_eval", "vlmevalkit"}


class TestAuthors:
    @pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
    def test_equals_the_released_function_on_recorded_answers(self, case):
        letter = authors(case["response"], [], 0, "training")
        truth = case["ground_truth"].strip().upper()
        assert float(letter == truth) == case["reward"]

    @pytest.mark.parametrize(
        "response, form, letter",
        [
            ("<answer>C</answer>", "vstar", "C"),
            ("<answer>(D) dark brown</answer>", "hrbench", "D"),
            ("<answer>The answer is B.</answer>", "vstar", "B"),
            ("<answer>The best option is A</answer>", "vstar", "A"),
            ("<answer>Based on the crop, C</answer>", "vstar", "B"),  # the B of "Based"
            ("<answer>East of it, B</answer>", "vstar", "B"),  # E is no letter of V*
            ("<answer>East of it, B</answer>", "mme_realworld", "E"),
            ("<answer>For sure B</answer>", "mme_realworld", "F"),
            ("<answer>For sure B</answer>", "vstar", "B"),
            ("<answer>a red one next to the blue one over there by far</answer>", "vstar", None),
            ("<answer>c</answer>", "vstar", None),
            ("<answer></answer>", "vstar", None),
            ("<answer>A</answer><answer>B</answer>", "vstar", "A"),
            ("<think>B", "vstar", None),
            ("B", "vstar", None),
            ("<answer>B", "vstar", None),
            ("<ANSWER>B</ANSWER>", "vstar", None),
        ],
    )  # fmt: skip
    def test_in_evaluation_an_answer_needs_its_tag(self, response, form, letter):
        assert authors(response, COLORS, 4, form, require_tag=True) == letter

    def test_two_options_do_not_change_the_letters(self):
        assert authors("D, or A", ["left", "right"], 2, "vstar") == "D"
        assert authors("G", [], 7, "vstar") == "G"


class TestLmmsEval:
    @pytest.mark.parametrize(
        "answer, letter",
        [
            ("C", "C"), ("c.", "C"), ("(C)", "C"), ("I say (c) then", "C"), ("it is d]", "D"),
            ("It is option C", "C"), ("My choice is: b", "B"), ("well , b , yes", "B"),
            ("The left one", None), ("over", None), ("ouch", "C"), ("", None),
        ],
    )  # fmt: skip
    def test_patterns_of_v_star(self, answer, letter):
        assert lmms_eval(answer, COLORS, 4, "vstar") == letter

    @pytest.mark.parametrize(
        "answer, letter",
        [
            ("B", "B"), ("(B).", "B"), ("B, not A", None), ("A blue one, C is there", "B"),
            ("It is DARK BROWN", "D"), ("red or blue", None), ("b", None),
            ("B said nobody for a very very long time", "B"), ("Z", None), ("Z red", None),
            ("Cannot determine the answer: B", None), ("Failed to obtain answer via API B", None),
            ("Failed to obtain answer via API red", "A"),
        ],
    )  # fmt: skip
    def test_a_letter_alone_or_a_text_in_hr_bench(self, answer, letter):
        assert lmms_eval(answer, COLORS, 4, "hrbench") == letter

    @pytest.mark.parametrize(
        "answer, letter",
        [
            ("The best answer is D", "D"), ("The answer is B", "B"), ("E", "E"), ("e", "E"),
            ("Best answer: C", "B"),  # a lead-in that is not one there
            ("", "A"), ("(", "A"), ("blue", None),
            ("one two three four five six seven eight nine ten eleven", None),
        ],
    )  # fmt: skip
    def test_the_first_capital_of_mme_realworld(self, answer, letter):
        assert lmms_eval(answer, [*COLORS, "none"], 5, "mme_realworld") == letter


class TestVlmEvalKit:
    @pytest.mark.parametrize(
        "answer, letter",
        [
            ("B", "B"), ("(B)", "B"), ("**B**", "B"), ("I choose {C}!", "C"),
            ("B is right since its colour is plain to see", None),  # too far from the end
            ("A or B", None), ("Z", None), ("I can't process this file. B", None),
            ("The correct answer is **c** because nobody else in this room wears it", "C"),
            ("The answer is blue", "B"),
            ("Dark Brown", "D"), ("red, not blue", None),
            ("red " * 40, None),  # much longer than the options
            ("Failed to obtain answer via API: D", None),
            ("Failed to obtain answer via API: red", "A"),
        ],
    )  # fmt: skip
    def test_cases(self, answer, letter):
        assert vlmevalkit(answer, COLORS, 4, "vstar") == letter

    def test_letters_end_with_the_options(self):
        assert vlmevalkit("C", ["left", "right"], 2, "vstar") is None
        assert vlmevalkit("B", ["left", "right"], 2, "vstar") == "B"

    def test_unknown_options_leave_only_letters(self):
        assert vlmevalkit("blue", [], 4, "vstar") is None
        assert vlmevalkit("B", [], 4, "vstar") == "B"


words = st.sampled_from(
    ["A", "b", "(C)", "D.", "answer is", "Answer:", "<answer>", "</answer>", "blue", "red", "Z",
     "dark brown", "option", "**", "\n", "The best answer is", "none"]
)  # fmt: skip
responses = st.text(max_size=40) | st.lists(words | st.text(max_size=5), max_size=9).map(" ".join)


@given(
    responses, st.lists(st.text(max_size=8), max_size=7), st.integers(0, 9), st.sampled_from(FORMS)
)
def test_any_text_gives_an_option_letter_or_none(response, options, choices, form):
    for rule in RULES.values():
        letter = rule(response, options, choices, form)
        assert letter is None or (len(letter) == 1 and letter in string.ascii_uppercase[:9])


@given(
    st.sampled_from("ABCD"), st.sampled_from(FORMS), st.sampled_from(["{}", "({})", "{}.", "\n{} "])
)
def test_all_rules_agree_on_a_plain_letter(letter, form, way):
    answer = way.format(letter)
    assert three(f"<think>maybe A</think><answer>{answer}</answer>", form) == (letter,) * 3


class TestOptionsInTheQuestion:
    @pytest.mark.parametrize(
        "question, options",
        [
            ("Which?\n(A) red\n(B) blue\nAnswer with the option's letter.", ["red", "blue"]),
            ("Which? (A) red (B) dark blue, (C) 3", ["red", "dark blue", "3"]),
            ("Which?\nA. red\nB. blue\nC. x", ["red", "blue", "x"]),
            ("Is (A) here?", []),
            ("Which? (B) red (A) blue", []),
            ("Which? (A) red (B) blue (A) green", []),
            ("U.S.A. or not?", []),
        ],
    )
    def test_are_found(self, question, options):
        assert options_in(question) == options

    @given(
        st.lists(
            st.from_regex(r"[a-z0-9]{1,8}( [a-z]{1,5})?", fullmatch=True), min_size=2, max_size=6
        )
    )
    def test_are_the_ones_that_were_written(self, options):
        lines = [f"({c}) {o}" for c, o in zip(string.ascii_uppercase, options, strict=False)]
        assert options_in("Which one is it?\n" + "\n".join(lines) + "\nAnswer directly.") == options

    @given(st.text(max_size=60))
    def test_any_text_is_read(self, question):
        assert all(isinstance(option, str) for option in options_in(question))


class TestRecords:
    def test_the_tag_is_needed_where_there_is_reasoning(self):
        record = {"reasoner_text": "B", "options": COLORS, "answer": "B"}
        assert records.chosen(record | {"mode": "default"})["authors"] == "B"
        assert records.chosen(record | {"mode": "p2r:crops=1"})["authors"] is None
        assert records.chosen(record | {"mode": "p2r:crops=1"})["lmms_eval"] == "B"

    def test_form_and_options_are_told_by_the_record(self):
        plain = {"question": "Which?\n(A) red\n(B) blue", "options": [], "answer": "B"}
        assert records.options_of(plain) == (["red", "blue"], 2)
        assert records.form_of(plain, 2) == "vstar"
        assert records.form_of(plain | {"meta": {"cycle_category": 0}}, 4) == "hrbench"
        five = {"options": [*"vwxyz"], "answer": "A"}
        assert records.form_of(five, records.options_of(five)[1]) == "mme_realworld"
        assert records.options_of({"question": "?", "answer": "E"}) == ([], 5)
        assert records.options_of({"options": {"A": "x", "B": "y"}}) == (["x", "y"], 2)

    def test_option_letters_are_told_from_other_answers(self):
        assert records.is_choice({"answer": "B"})
        assert not records.is_choice({"answer": "B", "answer_form": "free_form"})
        assert not records.is_choice({"answer": "12"})
        assert records.is_choice({"answer": "B", "answer_form": "mca"})

    def test_no_text_is_no_answer(self):
        none = {"reasoner_text": None, "options": COLORS, "answer": "B", "mode": "p2r"}
        assert set(records.chosen(none).values()) == {None}

    def test_clusters_are_images_else_rotations_else_repeated_questions(self):
        rows = [{"id": i, "image_hash": i // 4, "cluster": i // 2} for i in range(8)]
        assert records.clusters(rows) == [0] * 4 + [1] * 4
        assert records.clusters([{**r, "image_hash": None} for r in rows]) == [
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
        ]
        assert records.clusters(rows[::4]) is None
        assert records.clusters([{"id": "a"}, {"id": "a"}]) is None
        twice = [{"id": "a", "sample": s} for s in range(2)]
        assert records.clusters(twice) == ["a", "a"]
