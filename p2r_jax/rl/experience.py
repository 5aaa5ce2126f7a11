"""What a step collects before its update: what the learning role wrote, and what it earned.

    perceiver   policy writes G box lists a question; the frozen reasoner answers each once
    reasoner    the frozen perceiver writes one box list a question; policy writes G answers
    baseline    policy writes G answers to the plain image (the single-stage control)

B questions, G completions each.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flax import nnx

from p2r_jax.config import PhaseConfig
from p2r_jax.data.loader import LoadedRow
from p2r_jax.data.rows import Row
from p2r_jax.rl.rewards import Reward, Verifier, answer_reward, perceiver_reward, reasoner_reward
from p2r_jax.roles.answers import TRAINING_LETTERS, choice_letters
from p2r_jax.roles.boxes import ParsedBoxes, parse_response
from p2r_jax.roles.pipeline import Completion, Pipeline, Rollout
from p2r_jax.roles.requests import ImageStore, Request
from p2r_jax.rollout.generate import Schedule
from p2r_jax.rollout.sampling import Sampling

Grader = Callable[[Row, str], float | None]
"""(row, response) -> 1 or 0, or None if nothing could grade it."""


@dataclasses.dataclass
class Experience:
    """What one step collected, before the update."""

    rollout: Rollout
    rewards: list[list[Reward]]
    partner_texts: list[list[str]]
    """What the frozen partner wrote: per completion (perceiver phase) or per question."""
    boxes: list[list[ParsedBoxes]]
    """Boxes that the answers were given with."""
    idle_requests: list[Request]
    """Prompts of the idle role in this step, with the snapshot's greedy outputs, for the anchor."""
    idle_outputs: list[Completion]


class Clock:
    """Wall seconds by stage of one step, added up over the run in `totals`."""

    def __init__(self, totals: dict[str, float]):
        self.totals = totals
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin
        self.totals[name] += time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Step:
    """What experience is collected from and with."""

    phase: PhaseConfig
    pipeline: Pipeline
    policy: nnx.State
    """Weights that learn, laid out for decoding."""
    partner: nnx.State
    """Weights of the phase's start."""
    rows: Sequence[LoadedRow]
    images: ImageStore
    seeds: np.ndarray
    """One per question."""
    schedule: Schedule
    """Of the policy's rollout."""
    grade: Grader
    clock: Clock

    @property
    def questions(self) -> list[tuple[int, str, str]]:
        """(image index, question with options, answer form) of each row."""
        return [
            (i, r.row.question_with_options, r.row.answer_form) for i, r in enumerate(self.rows)
        ]

    def sample(self, requests: Sequence[Request]) -> Rollout:
        """G completions of each request by the policy."""
        sampling = phase_sampling(self.phase)
        return self.pipeline.sample(
            self.policy, requests, self.images, sampling, self.seeds, self.schedule
        )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Greedy completions by the partner."""
        sampling = Sampling(self.phase.partner_max_new_tokens)
        return self.pipeline.complete(self.partner, requests, self.images, sampling)

    def grade_answers(self, rollout: Rollout) -> list[list[Reward]]:
        return [
            [reasoner_reward(text, self.grade(loaded.row, text)) for text in texts]
            for loaded, texts in zip(self.rows, rollout.texts, strict=True)
        ]


def phase_sampling(phase: PhaseConfig) -> Sampling:
    """How the learning role's completions are drawn. Raises ValueError naming a bad setting."""
    shared = {field.name for field in dataclasses.fields(Sampling)}
    return Sampling(**{k: v for k, v in dataclasses.asdict(phase).items() if k in shared})


def grader(verifier: Verifier | None) -> Grader:
    """Grades by the answer form of the row; `verifier` for free text."""

    def grade(row: Row, answer: str) -> float | None:
        # The authors' A to E, and further where a row has more options.
        letters = max(TRAINING_LETTERS, choice_letters(len(row.options), row.answer), key=len)
        return answer_reward(
            answer,
            row.answer,
            row.answer_form,
            verifier,
            question=row.question_with_options,
            letters=letters,
        )

    return grade


def collect(step: Step) -> Experience:
    """Experience of the role that learns in this phase."""
    return COLLECT[step.phase.role](step)


def perceiver_experience(step: Step) -> Experience:
    """The policy samples box lists; the frozen reasoner answers once for each."""
    builder, group = step.pipeline.builder, step.phase.group
    with step.clock("rollout"):
        rollout = step.sample([builder.plain("perceiver", step.images, *q) for q in step.questions])
    parsed = [[parse_response(text) for text in texts] for texts in rollout.texts]
    with step.clock("partner"):
        asked = [
            builder.reasoner(step.images, *question, p.boxes)
            for question, boxes in zip(step.questions, parsed, strict=True)
            for p in boxes
        ]
        answers = step.complete(asked)
    texts = [answer.text for answer in answers]
    grouped = [texts[i : i + group] for i in range(0, len(texts), group)]
    with step.clock("reward"):
        rewards = [
            [
                perceiver_reward(p, step.grade(loaded.row, answer))
                for p, answer in zip(boxes, own, strict=True)
            ]
            for loaded, boxes, own in zip(step.rows, parsed, grouped, strict=True)
        ]
    return Experience(rollout, rewards, grouped, parsed, asked, answers)


def reasoner_experience(step: Step) -> Experience:
    """The frozen perceiver boxes once a question; the policy samples answers."""
    builder, group = step.pipeline.builder, step.phase.group
    with step.clock("partner"):
        asked = [builder.plain("perceiver", step.images, *q) for q in step.questions]
        written = step.complete(asked)
    parsed = [parse_response(output.text) for output in written]
    with step.clock("rollout"):
        rollout = step.sample(
            [
                builder.reasoner(step.images, *question, p.boxes)
                for question, p in zip(step.questions, parsed, strict=True)
            ]
        )
    with step.clock("reward"):
        rewards = step.grade_answers(rollout)
    texts, boxes = [[output.text] for output in written], [[p] * group for p in parsed]
    return Experience(rollout, rewards, texts, boxes, asked, written)


def baseline_experience(step: Step) -> Experience:
    """The policy samples answers to the plain image with the reasoning prompt."""
    builder = step.pipeline.builder
    with step.clock("rollout"):
        rollout = step.sample([builder.plain("baseline", step.images, *q) for q in step.questions])
    with step.clock("reward"):
        rewards = step.grade_answers(rollout)
    nothing = [[ParsedBoxes((), True)] * step.phase.group for _ in step.rows]
    return Experience(rollout, rewards, [[] for _ in step.rows], nothing, [], [])


COLLECT = {
    "perceiver": perceiver_experience,
    "reasoner": reasoner_experience,
    "baseline": baseline_experience,
}


def sample_records(
    step: Step, experience: Experience, advantages: np.ndarray, number: int, count: int
) -> list[dict[str, Any]]:
    """Every completion of the first `count` questions of step `number`, for the sample files."""
    records = []
    for b, loaded in enumerate(step.rows[:count]):
        partner = experience.partner_texts[b]
        for g, text in enumerate(experience.rollout.texts[b]):
            boxes, reward = experience.boxes[b][g].boxes, experience.rewards[b][g]
            records.append(
                {
                    "step": number,
                    "phase": step.phase.role,
                    "role": step.phase.role,
                    "id": loaded.row.id,
                    "question": loaded.row.question_with_options,
                    "answer": loaded.row.answer,
                    "completion": text,
                    "reward": reward.value,
                    "reward_parts": reward.parts,
                    "advantage": float(advantages[b, g]),
                    "partner_completion": partner[g if len(partner) > 1 else 0] if partner else "",
                    "boxes": [list(box.bbox_2d) for box in boxes],
                    "labelled_boxes": [
                        {"bbox_2d": list(box.bbox_2d), "label": box.label} for box in boxes
                    ],
                    "true_boxes": [list(box) for box in loaded.row.boxes],
                }
            )
    return records
