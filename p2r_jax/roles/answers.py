"""Grading: from a completion and a ground truth to a reward in {0, 1}.

Bad model output is wrong (0). What cannot be graded is None: the sample is dropped from the loss
and counted, never scored 0 in silence. The defaults are the training rule; evaluation passes
`require_tag=True` and the letters its benchmark offers.

    answer form   ground truth   graded by
    mca           option letter  `choice_reward`
    na            number         `number_reward` (math-verify)
    free_form     text           a verifier, usually another language model
"""

from __future__ import annotations

import logging
import re
import string
import threading
import time
from collections.abc import Iterable
from typing import Protocol

logger = logging.getLogger(__name__)

ANSWER_FORMS = ("mca", "na", "free_form")
TRAINING_LETTERS = "ABCDE"

_OPEN, _CLOSE = "<answer>", "</answer>"
# Phrases that announce a choice; some hold capitals that would pass for an option.
_LEAD_IN = re.compile(
    r"(?:Best answer|Best option|Answer|Option):|The (?:best |correct )?(?:answer|option)(?: is)?"
)
_SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})\b")
_GRADING_SECONDS = 2  # math-verify's own limit, for answers like 9**9**9**9


class Verifier(Protocol):
    """Judges a free-form answer. May raise; the call is then repeated."""

    def __call__(self, question: str, answer: str, response: str) -> bool:
        """Whether `response`, the model's extracted answer, means the same as the true `answer`."""
        ...


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

    try:
        truth = parse(
            _plain_notation(ground_truth), parsing_timeout=_GRADING_SECONDS, raise_on_error=True
        )
    except (Exception, TimeoutException):
        truth = []
    if not truth:
        logger.warning("ground truth %r holds no number; its samples are dropped", ground_truth)
        return None

    if require_tag and not has_answer_tag(response):
        return 0.0
    try:
        answer = parse(
            _plain_notation(extract_answer(response)),
            parsing_timeout=_GRADING_SECONDS,
            raise_on_error=True,
        )
        equal = verify(truth, answer, timeout_seconds=_GRADING_SECONDS, raise_on_error=True)
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


def answer_reward(
    response: str,
    ground_truth: str,
    answer_form: str,
    verifier: Verifier | None = None,
    *,
    question: str = "",
    require_tag: bool = False,
    letters: str = TRAINING_LETTERS,
    attempts: int = 3,
    retry_wait_seconds: float = 2.0,
) -> float | None:
    """The reward of a completion, by the form its answer should have.

    Args:
      response: the whole completion.
      ground_truth: the right answer.
      answer_form: `mca`, `na` or `free_form`.
      verifier, question: needed for `free_form` only.
      require_tag: an answer outside `<answer>…</answer>` is wrong; for evaluation.
      letters: the options there are, for `mca`; see `choice_reward`.
      attempts, retry_wait_seconds: how often a failing verifier is asked, and the pause after the
        first failure; it doubles each time.

    Returns:
      1.0 or 0.0, or None if it could not be graded: drop the sample and count it.

    Raises:
      ValueError: see `require_verifier`.
    """
    require_verifier([answer_form], verifier)
    if answer_form == "mca":
        return choice_reward(response, ground_truth, letters=letters, require_tag=require_tag)
    if answer_form == "na":
        return number_reward(response, ground_truth, require_tag=require_tag)

    if require_tag and not has_answer_tag(response):
        return 0.0
    assert verifier is not None  # by require_verifier
    answer = extract_answer(response)
    for attempt in range(attempts):
        if attempt:
            time.sleep(retry_wait_seconds * 2 ** (attempt - 1))
        try:
            verdict = verifier(question, ground_truth, answer)
        except Exception as error:
            logger.warning("verifier failed (%d of %d): %r", attempt + 1, attempts, error)
            continue
        if isinstance(verdict, bool):
            return float(verdict)
        logger.warning(
            "verifier returned %r, not a bool (%d of %d)", verdict, attempt + 1, attempts
        )
    return None


def _tagged_answer(response: str) -> str | None:
    _, opened, rest = response.partition(_OPEN)
    answer, closed, _ = rest.partition(_CLOSE)
    return answer if opened and closed else None


def _plain_notation(text: str) -> str:
    """Two notations math-verify does not read: the minus sign proper, and 1e6."""
    return _SCIENTIFIC.sub(r"*10^(\1)", text.replace("\N{MINUS SIGN}", "-"))
