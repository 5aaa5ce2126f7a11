"""Rows of metrics.jsonl as runs write them: one whose second phase falls apart, and a healthy one.

The first follows a run of the demo: 100 perceiver steps that went well, then 80 reasoner steps, of
which the last 45 undid what was learned while the reward stood still.
"""

from __future__ import annotations

import math
import random
from typing import Any

Row = dict[str, Any]


def step_row(step: int, phase: str, number: int, phase_step: int, **values: float) -> Row:
    row = {"step": step, "phase": phase, "round": 1, "phase_number": number}
    healthy = {
        "reward/mean": 0.6,
        "reward/teaching_groups": 0.5,
        "reward/only_training": 0.0,
        "completion/truncated_fraction": 0.0,
        "kl/mean": 0.01,
        "entropy/mean": 0.1,
        "loss/anchor": 0.15,
        "grad_norm": 0.5,
    }
    return row | {"phase_step": phase_step} | healthy | values


def evaluated(row: Row, **accuracies: float) -> Row:
    """With a short evaluation of 128 questions."""
    for mode, accuracy in accuracies.items():
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 128)
        row |= {f"eval/{mode}/accuracy": accuracy}
        row |= {f"eval/{mode}/low": accuracy - half, f"eval/{mode}/high": accuracy + half}
    return row


def evaluation_row(name: str, step: int, accuracy: float) -> Row:
    row = {"step": step, "phase": "eval", "name": name}
    return row | {"eval/p2r/accuracy": accuracy, "time/evaluation": 40.0}


def healthy_rows() -> list[Row]:
    """A perceiver phase and a reasoner phase of a short run, as lively as healthy ones are: KL to
    .25, entropy down to a third, 70 % of groups without an advantage, noisy gradients."""
    rng, rows = random.Random(1), [evaluation_row("before", 0, 0.64)]
    for step in range(1, 181):
        number = 1 + (step > 100)
        length, phase_step = (100, 80)[number - 1], step - 100 * (number - 1)
        done = phase_step / length
        row = step_row(
            step,
            ("perceiver", "reasoner")[number - 1],
            number,
            phase_step,
            **{
                "reward/mean": 0.45 + 0.35 * done + rng.gauss(0, 0.06),
                "reward/teaching_groups": max(0.3, 0.7 - 0.4 * done) + rng.gauss(0, 0.05),
                "kl/mean": 0.25 * done + abs(rng.gauss(0, 0.01)),
                "entropy/mean": 0.4 * math.exp(-1.1 * done) + rng.gauss(0, 0.02),
                "loss/anchor": 0.2 - 0.05 * done + rng.gauss(0, 0.02),
                "grad_norm": 0.5 * math.exp(rng.gauss(0, 0.5)),
            },
        )
        if phase_step % 20 == 0 and phase_step < length:
            p2r = 0.64 + 0.18 * done + rng.gauss(0, 0.02)
            idle = "live_reasoner" if number == 1 else "live_perceiver"
            evaluated(row, p2r=p2r, default=0.25, **{idle: 0.66 + rng.gauss(0, 0.03)})
        rows.append(row)
        if phase_step == length:
            rows.append(evaluation_row("after" if number == 2 else "after_phase1", step, 0.82))
    return rows


def collapsing_rows() -> list[Row]:
    """Steps 101 to 180 of the run that fell apart, after the evaluation between its phases."""
    rng, rows = random.Random(2), [evaluation_row("after_phase1_perceiver", 100, 0.822)]
    accuracies = {20: 0.83, 40: 0.81, 60: 0.65}
    for phase_step in range(1, 81):
        gone = 1 / (1 + math.exp(-(phase_step - 50) / 5))  # From 0 to 1 around step 150.
        row = step_row(
            100 + phase_step,
            "reasoner",
            2,
            phase_step,
            **{
                "reward/mean": 0.78 + rng.gauss(0, 0.03),
                "reward/teaching_groups": 0.45 - 0.25 * gone + rng.gauss(0, 0.03),
                "completion/truncated_fraction": max(0.0, 0.51 * gone - 0.01),
                "kl/mean": 0.03 + 1.37 * gone + abs(rng.gauss(0, 0.01)),
                "entropy/mean": 0.08 + 0.19 * gone + rng.gauss(0, 0.005),
                "grad_norm": 0.5 * math.exp(rng.gauss(0, 0.4)),
            },
        )
        if phase_step in accuracies:
            evaluated(row, p2r=accuracies[phase_step], live_perceiver=0.82)
        rows.append(row)
    return [*rows, evaluation_row("after", 180, 0.62)]
