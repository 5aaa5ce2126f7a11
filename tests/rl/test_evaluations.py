"""Evaluations during training: what is logged, and how long each role may write."""

from __future__ import annotations

import types

import pytest

from p2r_jax.config import PhaseConfig, TrainConfig
from p2r_jax.rl.evaluations import Evaluations, decoding_of
from p2r_jax.rl.schedule import plan_phases
from p2r_jax.roles.grading import Grader


def make(tmp_path) -> Evaluations:
    config = TrainConfig(run=str(tmp_path))
    source = types.SimpleNamespace(__len__=lambda self: 8)
    return Evaluations(config, plan_phases(config, 64), None, [source] * 8, Grader())


def record(number: int, correct: float | None) -> dict:
    return {"id": str(number), "mode": "p2r", "category": "", "correct": correct, "boxes": []}


def test_answers_that_nothing_could_grade_are_left_out_and_counted(tmp_path):
    """Neither wrong nor the end of the run: one verifier failure in a thousand questions."""
    evaluations = make(tmp_path)
    evaluations.grader.asked, evaluations.grader.failed = 4, 1
    flat = evaluations._flat([record(0, 1.0), record(1, None), record(2, 0.0), record(3, 1.0)])
    assert flat["eval/p2r/accuracy"] == pytest.approx(2 / 3)
    assert flat["eval/ungraded"] == 1
    assert (flat["eval/verifier_asked"], flat["eval/verifier_failed"]) == (4, 1)
    # The counts of the next step are its own.
    assert evaluations.grader.counts() == {"asked": 0, "failed": 0}


def test_if_nothing_could_be_graded_there_is_no_accuracy(tmp_path):
    flat = make(tmp_path)._flat([record(0, None)])
    assert flat["eval/ungraded"] == 1
    assert "eval/p2r/accuracy" not in flat


def test_each_role_may_write_what_it_may_write_in_any_phase():
    joint = PhaseConfig(role="joint", max_new_tokens=1024, partner_max_new_tokens=256)
    decoding = decoding_of(TrainConfig(phases=[joint]))
    assert decoding.perceiver.max_new_tokens == 1024
    assert decoding.reasoner.max_new_tokens == 1024
    longer = PhaseConfig(role="joint", max_new_tokens=64, reasoner_max_new_tokens=512,
                         partner_max_new_tokens=128)  # fmt: skip
    decoding = decoding_of(TrainConfig(phases=[longer]))
    assert (decoding.perceiver.max_new_tokens, decoding.reasoner.max_new_tokens) == (128, 512)
