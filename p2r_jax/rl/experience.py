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
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flax import nnx

from p2r_jax.config import PhaseConfig, RewardConfig
from p2r_jax.data.loader import LoadedRow
from p2r_jax.qwen3_vl.inputs import Prompts
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.rl.rewards import Grades, Reward, perceiver_reward, reasoner_reward
from p2r_jax.roles.answers import answer_to
from p2r_jax.roles.boxes import ParsedBoxes, parse_response
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import ImageStore, placed_again, share_of
from p2r_jax.roles.pipeline import Completion, Pipeline, Rollout
from p2r_jax.roles.requests import Request
from p2r_jax.rollout.generate import Completions, Schedule
from p2r_jax.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Experience:
    """What one step collected, before the update. Lists are by question."""

    rows: list[LoadedRow]
    requests: list[Request]
    """Prompts of the role that learns."""
    prompts: Prompts
    """The same on the device: B' rows, see `Rollout`."""
    completions: Completions
    texts: list[list[str]]
    """[B][G]."""
    rewards: list[list[Reward]]
    """[B][G]."""
    partner_texts: list[list[str]]
    """What the frozen partner wrote: per completion (perceiver) or per question (reasoner)."""
    boxes: list[list[ParsedBoxes]]
    """[B][G]: boxes that the answers were given with."""
    idle_requests: list[list[Request]]
    """Prompts of the idle role, with the snapshot's greedy outputs, for the role anchor."""
    idle_outputs: list[list[Completion]]


class Clock:
    """Wall seconds by stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Step:
    """What experience is collected from and with."""

    phase: PhaseConfig
    """Of one role that learns."""
    reward: RewardConfig
    pipeline: Pipeline
    policy: nnx.State
    """Weights that learn, laid out for decoding."""
    partner: nnx.State
    """Weights of the idle role."""
    rows: Sequence[LoadedRow]
    images: ImageStore
    seeds: np.ndarray
    """One per question."""
    schedule: Schedule
    """Of the policy's rollout."""
    grader: Grader
    clock: Clock

    @property
    def questions(self) -> list[tuple[int, str, str]]:
        """(image index, question with options, answer form) of each row."""
        return [
            (i, r.row.question_with_options, r.row.answer_form) for i, r in enumerate(self.rows)
        ]

    def plain(self, role: Any) -> list[Request]:
        """One request a question that sees the plain image."""
        builder = self.pipeline.builder
        return [builder.plain(role, self.images, *question) for question in self.questions]

    def sample(self, requests: Sequence[Request]) -> Rollout:
        """G completions of each request by the policy."""
        sampling = phase_sampling(self.phase)
        return self.pipeline.sample(
            self.policy, requests, self.images, sampling, self.seeds, self.schedule, self.clock
        )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Greedy completions by the partner."""
        sampling = Sampling(self.phase.partner_max_new_tokens)
        with self.clock("partner"):
            return self.pipeline.complete(self.partner, requests, self.images, sampling)

    def grade(self, responses: list[list[str]]) -> list[list[Grades]]:
        """Grades of each of the G answers to each question."""
        answers = [
            answer_to(loaded.row, response, rule)
            for rule in (self.reward.answer_rule, "evaluation")
            for loaded, group in zip(self.rows, responses, strict=True)
            for response in group
        ]
        with self.clock("reward"):
            grades = self.grader.grade(answers)
        half = len(grades) // 2
        both = [Grades(*pair) for pair in zip(grades[:half], grades[half:], strict=True)]
        return _grouped(both, self.phase.group)


def phase_sampling(phase: PhaseConfig) -> Sampling:
    """How the learning role's completions are drawn. Raises ValueError naming a bad setting."""
    shared = {field.name for field in dataclasses.fields(Sampling)}
    return Sampling(**{k: v for k, v in dataclasses.asdict(phase).items() if k in shared})


def collect(step: Step) -> Experience:
    """Experience of the role that learns."""
    return COLLECT[step.phase.role](step)


def perceiver_experience(step: Step) -> Experience:
    """The policy samples box lists; the frozen reasoner answers once for each."""
    builder, group = step.pipeline.builder, step.phase.group
    requests = step.plain("perceiver")
    rollout = step.sample(requests)
    parsed = [[parse_response(text) for text in texts] for texts in rollout.texts]
    asked = [
        builder.reasoner(step.images, *question, p.boxes)
        for question, boxes in zip(step.questions, parsed, strict=True)
        for p in boxes
    ]
    answers = _grouped(step.complete(asked), group)
    texts = [[answer.text for answer in own] for own in answers]
    rewards = [
        [perceiver_reward(p, grades, step.reward) for p, grades in zip(boxes, own, strict=True)]
        for boxes, own in zip(parsed, step.grade(texts), strict=True)
    ]
    return _experience(
        step, requests, rollout, rewards, texts, parsed, _grouped(asked, group), answers
    )


def reasoner_experience(step: Step) -> Experience:
    """The frozen perceiver boxes once a question; the policy samples answers."""
    builder, group = step.pipeline.builder, step.phase.group
    asked = step.plain("perceiver")
    written = step.complete(asked)
    parsed = [parse_response(output.text) for output in written]
    requests = [
        builder.reasoner(step.images, *question, p.boxes)
        for question, p in zip(step.questions, parsed, strict=True)
    ]
    rollout = step.sample(requests)
    texts, boxes = [[output.text] for output in written], [[p] * group for p in parsed]
    return _experience(
        step,
        requests,
        rollout,
        _answer_rewards(step, rollout),
        texts,
        boxes,
        [[request] for request in asked],
        [[output] for output in written],
    )


def baseline_experience(step: Step) -> Experience:
    """The policy samples answers to the plain image with the reasoning prompt."""
    requests = step.plain("baseline")
    rollout = step.sample(requests)
    nothing = [[ParsedBoxes((), True)] * step.phase.group for _ in step.rows]
    none: list[Any] = [[] for _ in step.rows]
    rewards = _answer_rewards(step, rollout)
    return _experience(step, requests, rollout, rewards, none, nothing, none, none)


COLLECT = {
    "perceiver": perceiver_experience,
    "reasoner": reasoner_experience,
    "baseline": baseline_experience,
}


def _answer_rewards(step: Step, rollout: Rollout) -> list[list[Reward]]:
    return [
        [reasoner_reward(text, own) for text, own in zip(texts, grades, strict=True)]
        for texts, grades in zip(rollout.texts, step.grade(rollout.texts), strict=True)
    ]


def _experience(
    step: Step, requests: list[Request], rollout: Rollout, rewards: list[list[Reward]], *rest: Any
) -> Experience:
    return Experience(
        list(step.rows), requests, rollout.prompts, rollout.completions, rollout.texts, rewards,
        *rest,
    )  # fmt: skip


def _grouped(flat: Sequence[Any], group: int) -> list[list[Any]]:
    return [list(flat[i : i + group]) for i in range(0, len(flat), group)]


# --- dynamic sampling -----------------------------------------------------------------------------


def teaches(rewards: Sequence[Reward]) -> bool:
    """Whether the rewards of a group differ; if not, all its advantages are 0."""
    return len({reward.value for reward in rewards if reward.value is not None}) > 1


def choose(
    parts: Sequence[Experience], count: int, pipeline: Pipeline
) -> tuple[Experience, ImageStore]:
    """`count` questions out of several batches: those that teach, then the others to fill up.

    Their images are uploaded again, since each batch has a store of its own. None of them leaves
    the process that decoded it, so a device may get more than its share: at most that of each of
    the batches.
    """
    every = [(part, i) for part in parts for i in range(len(part.rows))]
    every.sort(key=lambda item: not teaches(item[0].rewards[item[1]]))  # stable
    chosen = every[:count]
    builder = pipeline.builder
    rows = [part.rows[i] for part, i in chosen]
    if all(row.shard is not None for row in rows):
        shards = placed_again([row.shard or 0 for row in rows], share_of(builder.mesh))
        rows = [dataclasses.replace(r, shard=s) for r, s in zip(rows, shards, strict=True)]
    images = ImageStore.of_rows(rows, builder.buckets, builder.mesh)

    def moved(requests: Sequence[Request], image: int) -> list[Request]:
        return [dataclasses.replace(request, image=image) for request in requests]

    def field(name: str) -> list[Any]:
        return [getattr(part, name)[i] for part, i in chosen]

    requests = [moved([part.requests[i]], n)[0] for n, (part, i) in enumerate(chosen)]
    arrays = {
        name: np.stack([getattr(part.completions, name)[i] for part, i in chosen])
        for name in ("tokens", "log_probs", "mask", "stopped")
    }
    steps = sum(part.completions.steps for part in parts)
    drawn = sum(part.completions.steps * part.completions.occupancy for part in parts)
    lists = ("texts", "rewards", "partner_texts", "boxes", "idle_outputs")
    return Experience(
        rows=rows,
        requests=requests,
        prompts=builder.collate(requests, images),
        completions=Completions(**arrays, steps=steps, occupancy=drawn / max(steps, 1)),
        idle_requests=[moved(own, n) for n, own in enumerate(field("idle_requests"))],
        **{name: field(name) for name in lists},
    ), images


# --- for people -----------------------------------------------------------------------------------


def sample_records(
    role: str,
    experience: Experience,
    advantages: np.ndarray,
    processor: Processor,
    count: int,
    **where: Any,
) -> list[dict[str, Any]]:
    """Every completion of the first `count` questions, for the sample files.

    role: that wrote them. where: of the step, such as its number and phase.
    """
    records = []
    for b, loaded in enumerate(experience.rows[:count]):
        prompt = processor.prompt_text(experience.requests[b].tokens)
        partner = experience.partner_texts[b]
        for g, text in enumerate(experience.texts[b]):
            boxes, reward = experience.boxes[b][g].boxes, experience.rewards[b][g]
            records.append(
                {
                    **where,
                    "role": role,
                    "id": loaded.row.id,
                    "question": loaded.row.question_with_options,
                    "answer": loaded.row.answer,
                    "prompt": prompt,
                    "prompt_tokens": len(experience.requests[b].tokens),
                    "completion": text,
                    "completion_tokens": int(experience.completions.mask[b, g].sum()),
                    "truncated": not bool(experience.completions.stopped[b, g]),
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
