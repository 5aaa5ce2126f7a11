"""Grading: from completions and ground truths to rewards in {0, 1}.

Bad model output is wrong (0). What cannot be graded is None: the sample is dropped from the loss
and counted, never scored 0 in silence. Training and evaluation grade by one rule (`answer_to`):
what the first closed `<answer>…</answer>` holds, among the options there are. The defaults of the
functions below are the authors' laxer rule for training, which a setting brings back.

    answer form   ground truth   graded by
    mca           option letter  `choice_reward`
    na            number         `number_reward` (math-verify)
    free_form     text           a verifier, usually another language model (`roles.verifiers`)

`grade` is for one process; `roles.grading.Grader` shares the work among several.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import string
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

from p2r_jax.data.rows import Row

logger = logging.getLogger(__name__)

AnswerRule = Literal["evaluation", "authors"]
ANSWER_FORMS = ("mca", "na", "free_form")
TRAINING_LETTERS = "ABCDE"

_OPEN, _CLOSE = "<answer>", "</answer>"
# Phrases that announce a choice; some hold capitals that would pass for an option.
_LEAD_IN = re.compile(
    r"(?:Best answer|Best option|Answer|Option):|The (?:best |correct )?(?:answer|option)(?: is)?"
)
_SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})\b")
_GRADING_SECONDS = 2  # math-verify's own limit, for answers like 9**9**9**9


@dataclasses.dataclass(frozen=True)
class Answer:
    """A completion, and what is needed to grade it."""

    response: str
    """The whole completion."""
    ground_truth: str
    answer_form: str
    """`mca`, `na` or `free_form`."""
    question: str = ""
    """With its options; for a verifier."""
    letters: str = TRAINING_LETTERS
    """The options there are, for `mca`; see `choice_reward`."""
    require_tag: bool = False
    """An answer outside `<answer>…</answer>` is wrong; for evaluation."""


@dataclasses.dataclass(frozen=True)
class Query:
    """What a verifier judges."""

    question: str
    answer: str
    """The true one."""
    response: str
    """The model's answer, without what it wrote around it."""


class Verifier(Protocol):
    """Judges free-form answers, many at a time."""

    collective: bool
    """Whether a judgement is a computation of all processes: each must then ask the same queries.
    Otherwise a process may ask about its share alone."""

    def __call__(self, queries: Sequence[Query]) -> list[bool | None]:
        """Whether each response means the same as the true answer, in order.

        None: could not be judged, even when asked again. Whatever stands behind a verifier and
        fails (a server, a function) leads to None, never to an exception.
        """
        ...


def answer_to(row: Row, response: str, rule: AnswerRule = "evaluation") -> Answer:
    """A completion as it is graded.

    rule: `evaluation` = the first closed `<answer>…</answer>` counts, among the row's options;
    `authors` = without one the whole completion, and A to E are options always (P2R §4).
    """
    letters = choice_letters(len(row.options), row.answer)
    if rule == "authors":
        letters = max(TRAINING_LETTERS, letters, key=len)
    return Answer(
        response,
        row.answer,
        row.answer_form,
        question=row.question_with_options,
        letters=letters,
        require_tag=rule == "evaluation",
    )


def has_answer_tag(response: str) -> bool:
    """Whether the completion holds a closed `<answer>…</answer>`."""
    return _tagged_answer(response) is not None


def extract_answer(response: str) -> str:
    """The text of the first `<answer>…</answer>`, or the whole completion if none; stripped."""
    tagged = _tagged_answer(response)
    return (response if tagged is None else tagged).strip()


def choice_letters(options: int, answer: str) -> str:
    """Letters that count as a choice among `options`; if they are in the question's text (0), the
    training rule's A to E, or further if the true answer is."""
    if not options and len(answer) == 1 and answer in string.ascii_uppercase:
        options = string.ascii_uppercase.index(answer) + 1
        options = max(options, len(TRAINING_LETTERS))
    return string.ascii_uppercase[:options] or TRAINING_LETTERS


def choice_letter(answer: str, letters: str = TRAINING_LETTERS) -> str:
    """The first of the capital `letters` anywhere in the answer, lead-ins aside; "" if none.

    "The answer is B." gives "B" and "Answer: C" gives "C", but "Based on it, C" gives "B": so it is
    in the authors' rule.
    """
    found = re.search(f"[{re.escape(letters)}]", _LEAD_IN.sub("", answer))
    return found[0] if found else ""


def choice_reward(
    response: str,
    ground_truth: str,
    *,
    letters: str = TRAINING_LETTERS,
    require_tag: bool = False,
) -> float:
    """1.0 if the completion chooses the right option (P2R §4), else 0.0.

    Args:
      response: the whole completion.
      ground_truth: an option letter, in any case. Rows are checked when read; here anything else
        never matches.
      letters: the options there are: A–E in training; A–D for V* and HR-Bench, A–F for
        MME-RealWorld.
      require_tag: an answer outside `<answer>…</answer>` is wrong; for evaluation.
    """
    if require_tag and not has_answer_tag(response):
        return 0.0
    letter = choice_letter(extract_answer(response), letters)
    return float(letter != "" and letter == ground_truth.strip().upper())


def number_reward(response: str, ground_truth: str, *, require_tag: bool = False) -> float | None:
    """1.0 if the completion's last number or expression equals the ground truth, else 0.0.

    Equality is mathematical: 1/2 = 0.5 = 50 %, 1,234 = 1234; units are ignored. Whatever goes
    wrong in reading or comparing the model's answer, a time limit included, makes it wrong.

    Returns:
      None if the ground truth itself holds no number: no answer could be graded.

    Raises:
      RuntimeError: not called from the main thread. math-verify limits its time with SIGALRM, and
        without the limit one answer like 9**9**9**9 would hang the run.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("number_reward must run in the main thread: its time limit is a signal")
    # sympy, behind math-verify, is slow to import, and only numeric answers need it.
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # a BaseException

    def within_limit(compute: Callable[[int], Any]) -> Any:
        # The limit is of wall time: a busy machine must not make a right answer wrong.
        try:
            return compute(_GRADING_SECONDS)
        except TimeoutException:
            return compute(2 * _GRADING_SECONDS)

    def read(text: str) -> Any:
        plain = _plain_notation(text)
        return within_limit(lambda s: parse(plain, parsing_timeout=s, raise_on_error=True))

    try:
        truth = read(ground_truth)
    except (Exception, TimeoutException):
        truth = []
    if not truth:
        logger.warning("ground truth %r holds no number; its samples are dropped", ground_truth)
        return None

    if require_tag and not has_answer_tag(response):
        return 0.0
    try:
        answer = read(extract_answer(response))
        equal = within_limit(
            lambda s: verify(truth, answer, timeout_seconds=s, raise_on_error=True)
        )
    except (Exception, TimeoutException):
        return 0.0
    return float(equal)


def require_verifier(answer_forms: Iterable[str], verifier: Verifier | None) -> None:
    """Checks, before any long work, that every answer form of the data can be graded.

    Raises:
      ValueError: an unknown form, or `free_form` answers without a verifier.
    """
    forms = set(answer_forms)
    unknown = forms - set(ANSWER_FORMS)
    if unknown:
        raise ValueError(
            f"answer_form {', '.join(sorted(map(repr, unknown)))} cannot be graded; "
            f"expected one of {', '.join(ANSWER_FORMS)}"
        )
    if "free_form" in forms and verifier is None:
        raise ValueError(
            "the data has answer_form 'free_form', which only a verifier can grade: "
            "configure one, or leave those rows out"
        )


def grade(answers: Sequence[Answer], verifier: Verifier | None) -> list[float | None]:
    """The reward of each answer, by the form it should have.

    The verifier is called once, about all free-form answers, and equal queries are asked once. It
    is not asked about answers that are wrong for want of a tag.

    Returns:
      1.0 or 0.0 each, or None if it could not be graded: drop the sample and count it.

    Raises:
      ValueError: see `require_verifier`.
      TypeError: see `settle`.
    """
    require_verifier({answer.answer_form for answer in answers}, verifier)
    units = [unit(answer) for answer in answers]
    distinct = list(dict.fromkeys(units))
    grades = dict(zip(distinct, settle(distinct, verifier), strict=True))
    return [grades[own] for own in units]


def unit(answer: Answer) -> Answer | Query:
    """What has to be settled: the query if a verifier is needed, else the answer without what its
    grade does not depend on. Answers with equal units get equal grades, whatever was written around
    them."""
    untagged = answer.require_tag and not has_answer_tag(answer.response)
    if answer.answer_form != "free_form" or untagged:
        letters = answer.letters if answer.answer_form == "mca" else TRAINING_LETTERS
        return dataclasses.replace(answer, letters=letters, require_tag=untagged)
    return Query(answer.question, answer.ground_truth, extract_answer(answer.response))


def settle(units: Sequence[Answer | Query], verifier: Verifier | None) -> list[float | None]:
    """The grade of each of several distinct `unit`s, in order.

    Raises TypeError if the verifier returns anything but one bool or None for each query, which is
    a fault of its code and would otherwise pass for a judgement.
    """
    queries = [u for u in units if isinstance(u, Query)]
    verdicts: list[bool | None] = []
    if queries:
        assert verifier is not None  # by require_verifier
        verdicts = verifier(queries)
        if len(verdicts) != len(queries):
            raise TypeError(f"the verifier returned {len(verdicts)} for {len(queries)} queries")
        for verdict in verdicts:
            if verdict is not None and not isinstance(verdict, bool):
                raise TypeError(f"the verifier returned {verdict!r}, neither a bool nor None")
    judged = dict(zip(queries, verdicts, strict=True))
    return [_by_rule(u) if isinstance(u, Answer) else _as_grade(judged[u]) for u in units]


def _by_rule(answer: Answer) -> float | None:
    response, truth, tag = answer.response, answer.ground_truth, answer.require_tag
    if answer.answer_form == "mca":
        return choice_reward(response, truth, letters=answer.letters, require_tag=tag)
    if answer.answer_form == "na":
        return number_reward(response, truth, require_tag=tag)
    return 0.0  # free text that misses its tag; see `unit`


def _as_grade(verdict: bool | None) -> float | None:
    return None if verdict is None else float(verdict)


def _tagged_answer(response: str) -> str | None:
    _, opened, rest = response.partition(_OPEN)
    answer, closed, _ = rest.partition(_CLOSE)
    return answer if opened and closed else None


def _plain_notation(text: str) -> str:
    """Two notations math-verify does not read: the minus sign proper, and 1e6."""
    return _SCIENTIFIC.sub(r"*10^(\1)", text.replace("\N{MINUS SIGN}", "-"))
