"""What a completion earns: the answer's grade, and for a perceiver the two penalties (P2R §1).

Grading itself is in `roles.answers`, because evaluation grades the same way; its public names are
importable from here too.
"""

from __future__ import annotations

import dataclasses

from p2r_jax.config import RewardConfig
from p2r_jax.roles.answers import (
    Answer,
    Query,
    Verifier,
    choice_reward,
    extract_answer,
    has_answer_tag,
    number_reward,
    require_verifier,
)
from p2r_jax.roles.boxes import ParsedBoxes, perceiver_penalty

__all__ = [
    "Answer",
    "Grades",
    "Query",
    "Reward",
    "Verifier",
    "choice_reward",
    "extract_answer",
    "has_answer_tag",
    "number_reward",
    "perceiver_reward",
    "reasoner_reward",
    "require_verifier",
]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward and what it is made of."""

    value: float | None
    """None: could not be graded; the sample is dropped from the loss and counted."""
    parts: dict[str, float]
    """Logged beside it: `answer` (the grade), penalties as 0 or 1, and facts about the text."""


@dataclasses.dataclass(frozen=True)
class Grades:
    """Of one answer, by the rule that rewards it and by the rule that evaluations score by.

    None: could not be graded.
    """

    training: float | None
    evaluation: float | None

    @property
    def parts(self) -> dict[str, float]:
        """The grade, and where the two rules disagree: training on answers that score nothing, or
        missing some that do."""
        if self.training is None:
            return {}
        parts = {"answer": self.training}
        if self.evaluation is not None:
            parts["only_training"] = float(self.training > self.evaluation)
            parts["only_evaluation"] = float(self.training < self.evaluation)
        return parts


def perceiver_reward(
    parsed: ParsedBoxes, grade: Grades | float | None, rules: RewardConfig | None = None
) -> Reward:
    """The grade of the frozen reasoner's answer, or 0 if the boxes break a rule.

    grade: None if the answer could not be graded. A broken rule decides without it. rules: which
    count; the parts tell of both always.
    """
    grades = _grades(grade)
    rules = rules or RewardConfig()
    penalty = perceiver_penalty(parsed.boxes)
    overlap, label = (penalty.iou and rules.overlap_penalty, penalty.label and rules.label_penalty)
    broken = overlap or label
    parts = {
        "overlap_penalty": float(penalty.iou),
        "label_penalty": float(penalty.label),
        "parse_ok": float(parsed.well_formed),
        "empty": float(not parsed.boxes),
        "boxes": float(len(parsed.boxes)),
    }
    return Reward(0.0 if broken else grades.training, parts | grades.parts)


def reasoner_reward(response: str, grade: Grades | float | None) -> Reward:
    """The grade of the policy's own answer."""
    grades = _grades(grade)
    parts = {"answer_tag": float(has_answer_tag(response))} | grades.parts
    return Reward(grades.training, parts)


def _grades(grade: Grades | float | None) -> Grades:
    return grade if isinstance(grade, Grades) else Grades(grade, grade)
