"""What one finished run says: verdict of every question, accuracy on the way, costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2r_jax.config import TrainConfig

MEASURES = {
    "samples": "completions that learning roles drew",
    "updates": "optimizer updates",
    "questions": "questions taken from the training data",
    "tokens": "read and written in training, by the partner too; a prompt once for its group",
    "visual_tokens": "of those, visual",
    "flops": "model FLOPs of training: rollout, partner, reference, update, anchor",
    "seconds": "of training steps, compilation left out",
}
"""What arms can be matched by."""

_PARTNER = ("tokens/partner_prompts", "tokens/partner_completions")


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return (folder / "summary.json").is_file() and (folder / "eval" / "after.jsonl").is_file()


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one arm with one seed."""

    correct: Mapping[str, int | None]
    """By question; None where nothing could grade the answer."""
    before: float | None
    """Accuracy before training."""
    curve: list[tuple[int, float, float]]
    """(step, samples so far, accuracy) of all evaluations of the outcome's mode."""
    measures: Mapping[str, float]


def read_result(folder: Path, config: TrainConfig, metric: str) -> Result:
    """Raises ValueError naming the run if it lacks what a study needs."""
    correct = _verdicts(folder / "eval" / "after.jsonl", metric)
    if not any(value is not None for value in correct.values()):
        raise ValueError(f"{folder}: no graded answer in the mode {metric!r} after training")
    first = folder / "eval" / "before.jsonl"
    before = [v for v in _verdicts(first, metric).values() if v is not None]
    rows = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    steps = [row for row in rows if row.get("phase") != "eval"]
    samples, so_far = {0: 0.0}, 0.0
    for row in steps:
        so_far += _total(row, "samples")
        samples[row["step"]] = so_far
    at = {
        row["step"]: row[f"eval/{metric}/accuracy"]
        for row in rows
        if row.get(f"eval/{metric}/accuracy") is not None
    }
    curve = [(step, samples.get(step, so_far), at[step]) for step in sorted(at)]
    return Result(
        correct, sum(before) / len(before) if before else None, curve, _measures(steps, config)
    )


def _verdicts(file: Path, metric: str) -> dict[str, int | None]:
    """Of the first answer to each question in a mode."""
    found: dict[str, int | None] = {}
    for line in _lines(file):
        record = json.loads(line)
        if record["mode"] == metric and not record.get("sample"):
            value = record["correct"]
            found[str(record["id"])] = None if value is None else int(value)
    return found


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _total(row: Mapping[str, Any], *names: str) -> float:
    """Of a step, by whichever roles: those of a joint phase have their name before the metric's."""
    roles = ("", "perceiver/", "reasoner/")
    return float(sum(row.get(role + name) or 0 for role in roles for name in names))


def _measures(steps: list[dict[str, Any]], config: TrainConfig) -> dict[str, float]:
    phases = config.phases
    own = [phases[(row["phase_number"] - 1) % len(phases)] for row in steps]
    skipped: dict[int, float] = {}
    for row in steps:
        skipped[row["phase_number"]] = row.get("skipped_steps", 0)
    if not config.optimizer.reset:  # It counts on over phases.
        skipped = {0: max(skipped.values(), default=0)}
    seconds = (row.get("time/step", 0) - row.get("compile/seconds", 0) for row in steps)
    tokens = ("tokens/prompts", "tokens/completions", *_PARTNER)
    visual = ("tokens/visual", "tokens/partner_visual")
    return {
        "samples": sum(_total(row, "samples") for row in steps),
        "updates": sum(phase.updates_per_step for phase in own) - sum(skipped.values()),
        "questions": sum(
            row.get("data/batches", 1) * phase.prompts
            for row, phase in zip(steps, own, strict=True)
        ),
        "tokens": sum(_total(row, *tokens) for row in steps),
        "visual_tokens": sum(_total(row, *visual) for row in steps),
        "flops": sum(_total(row, "flops/total") for row in steps),
        "seconds": float(sum(seconds)),
    }
