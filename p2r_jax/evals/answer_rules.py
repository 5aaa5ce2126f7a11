"""Which option a completion chooses, by three rules that people use and compare.

    answer         authors   lmms-eval   VLMEvalKit
    blue           none      B           B             (option B is "blue")
    b              none      B           none
    Answer: b      none      A           none          (the A of "Answer")
    dark brown     none      D           D             (option D is "dark brown")

The authors' rule is the one to report; the other two show how much of a difference to another
paper is the reading of answers. They were written anew from `vstar_bench/utils.py`,
`hrbench_evals.py` and `mme_realworld/utils.py` of lmms-eval and `matching_util.py` of VLMEvalKit,
without the language model that both may ask about what their rules leave open. All three read the
text in the first `<answer>` tag, or all of it if there is none: a harness that knows no tags would
score the reasoning.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias

from p2r_jax.roles.answers import TRAINING_LETTERS, choice_letter, extract_answer, has_answer_tag

Form: TypeAlias = Literal["vstar", "hrbench", "mme_realworld", "training"]
"""Of what benchmark a question has the form: both the authors and lmms-eval read each their own
way. `training` is the authors' reward."""

Rule: TypeAlias = Callable[[str, Sequence[str], int, Form], str | None]
"""(completion, texts of the options or none, number of options, form) -> letter, None if no option
is chosen. Never raises, whatever a model wrote."""

_AUTHORS_LETTERS = {
    "vstar": "ABCD",
    "hrbench": "ABCD",
    "mme_realworld": "ABCDEF",
    "training": TRAINING_LETTERS,
}
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# In order; the first that matches decides. Matched against upper case, so "blue" starts with B.
_LMMS_PATTERNS = (
    "^([{}])",
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([{}])",
    r"\(([{}])\)",
    r"([{}])\s*[.)\]]",
    r"(?:^|\s)([{}])(?:\s|$)",
)
_LMMS_LEAD_INS = re.compile("The best answer is|The correct answer is|The answer is|The answer")


def authors(
    response: str,
    options: Sequence[str],
    choices: int,
    form: Form = "vstar",
    require_tag: bool = False,
) -> str | None:
    """The authors': lead-ins aside, the first capital option letter anywhere.

    Letters are A-D (V*, HR-Bench), A-F (MME-RealWorld) or A-E (training), however few options there
    are, and more if there are more. require_tag: nothing outside `<answer>` counts, as in their
    evaluation of every mode with reasoning.
    """
    if require_tag and not has_answer_tag(response):
        return None
    letters = max(_AUTHORS_LETTERS[form], _letters(choices), key=len)
    return choice_letter(extract_answer(response), letters) or None


def lmms_eval(
    response: str, options: Sequence[str], choices: int, form: Form = "vstar"
) -> str | None:
    """lmms-eval's rule of the task: a list of patterns (V*), a lone letter, then an option's text
    (HR-Bench), the first capital, then a part of an option's label (MME-RealWorld)."""
    answer = extract_answer(response)
    if form == "hrbench":
        if any(refusal in answer for refusal in _REFUSALS):
            return None
        tokens = answer.translate(_PUNCTUATION).split()
        found = set() if _NO_ANSWER in answer else set(_letters(choices)) & set(tokens)
        if len(found) == 1:
            return found.pop()
        return None if not found and "Z" in tokens else _only_text(answer, options)
    if form == "mme_realworld":
        letters = max("ABCDE", _letters(choices), key=len)
        answer = _LMMS_LEAD_INS.sub("", answer.strip())
        capital = re.search(f"[{letters}]", answer)
        if capital:
            return capital[0]
        if len(answer.split()) > 10:
            return None
        # Also "", which is a part of "(A)": an empty answer is A there.
        return next((c for c in letters if answer.lower() in f"({c})".lower()), None)
    letters = max("ABCD", _letters(choices), key=len)
    answer = answer.strip().upper()
    for pattern in _LMMS_PATTERNS:
        match = re.search(pattern.format(letters), answer)
        if match:
            return match[1]
    single = [c for c in answer if c in letters]
    return single[0] if len(single) == 1 else None


def vlmevalkit(
    response: str, options: Sequence[str], choices: int, form: Form = "vstar"
) -> str | None:
    """VLMEvalKit's: the only option letter that stands alone, among the last five words; else what
    follows "answer is"; else the only option whose text occurs in a short answer.

    One rule for all forms: what it has of its own for MME-RealWorld may name several letters.
    """
    answer = extract_answer(response)
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    letters = _letters(choices)
    if _NO_ANSWER not in answer:
        words = answer.translate(_PUNCTUATION).split()
        alone = [letter for letter in letters if letter in words]
        if len(alone) == 1 and words.index(alone[0]) > len(words) - 5:
            return alone[0]
        if not alone and "Z" in words:
            return None
        announced = re.search(rf"answer\s+is\s+\**([{letters}])", answer, re.IGNORECASE)
        if announced:
            return announced[1].upper()
    if len(answer) > 2 * sum(map(len, options)):
        return None
    return _only_text(answer, options)


RULES: Mapping[str, Rule] = MappingProxyType(
    {"authors": authors, "lmms_eval": lmms_eval, "vlmevalkit": vlmevalkit}
)
"""By name, the one to report first."""


def options_in(question: str) -> list[str]:
    """Options that a published set wrote into its question, [] if there are none.

    Read where each stands at the start of a line or after a space, as "(A) red (B) blue" or one a
    line as "A. red"; letters must follow one another from A. The line after the last one (an
    instruction) is not part of it.
    """
    for mark in (r"(?:^|(?<=\s))\(([A-Z])\)\s*", r"^\s*([A-Z])[.:)]\s+"):
        marks = list(re.finditer(mark, question, re.MULTILINE))
        in_turn = [m for m, letter in zip(marks, string.ascii_uppercase, strict=False)
                   if m[1] == letter]  # fmt: skip
        if len(in_turn) >= 2 and len(in_turn) == len(marks):
            ends = [m.start() for m in marks[1:]] + [len(question)]
            texts = [question[m.end() : end] for m, end in zip(marks, ends, strict=True)]
            texts[-1] = texts[-1].split("\n")[0]
            return [text.strip().rstrip(",;") for text in texts]
    return []


def _letters(choices: int) -> str:
    return string.ascii_uppercase[: max(1, choices)]


def _only_text(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text is in the answer, in any case."""
    answer = answer.lower()
    found = [
        letter
        for letter, text in zip(string.ascii_uppercase, options, strict=False)
        if text.lower() in answer
    ]
    return found[0] if len(found) == 1 else None
