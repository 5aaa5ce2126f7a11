"""How far a run is, and what it has yet to write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from p2r_jax.evals.report_progress import progress_of


def make(run: Path, steps: list[int | None], rounds: int = 1, **settings) -> Path:
    roles = ("perceiver", "reasoner")
    phases = [{"role": roles[i % 2], "steps": n} for i, n in enumerate(steps)]
    config = {"rounds": rounds, "phases": phases, "eval": {"final_questions": 8}, **settings}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def taken(run: Path, lengths: list[int]) -> list[dict]:
    """Rows of so many steps of each phase, and the file they are in."""
    rows: list[dict] = []
    for number, length in enumerate(lengths, 1):
        for _ in range(length):
            where = {"phase": ("perceiver", "reasoner")[(number - 1) % 2], "phase_number": number}
            rows.append({"step": len(rows) + 1, "round": (number + 1) // 2, "x": 1.0, **where})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_run_in_the_middle_of_a_phase(tmp_path):
    run = make(tmp_path, [24, 12], rounds=2)
    progress = progress_of(run, taken(run, [24, 12, 7]), notes := [])
    assert not progress.finished
    assert (progress.step, progress.total) == (43, 72)
    assert progress.where == "round 2 perceiver, step 7 of 24"
    assert [(p.label, p.steps, p.done) for p in progress.phases] == [
        ("round 1 perceiver", 24, 24),
        ("round 1 reasoner", 12, 12),
        ("round 2 perceiver", 24, 7),
        ("round 2 reasoner", 12, 0),
    ]
    assert [p.share for p in progress.phases] == [1, 1, pytest.approx(7 / 24), 0]
    assert progress.written is not None
    assert notes == []


def test_what_is_still_to_come_is_named(tmp_path):
    run = make(tmp_path, [5, 5], rounds=2)
    (run / "eval").mkdir()
    for name in ("before.json", "after_phase1_perceiver.json", "after_phase2_reasoner.jsonl"):
        (run / "eval" / name).write_text("{}")
    assert progress_of(run, taken(run, [5, 5]), []).pending == [
        "evaluation after_phase2_reasoner",  # Its records are there, its summary is not.
        "evaluation after_phase3_perceiver",
        "evaluation after",
        "summary.json (written when a run ends)",
        "export (the weights in Hugging Face format, written when a run ends)",
    ]
    make(tmp_path, [5, 5], rounds=9, export=False)
    pending = progress_of(run, taken(run, [5, 5]), []).pending
    assert pending[1:4] == ["evaluation after_phase3_perceiver", "14 more", "evaluation after"]
    assert "export" not in pending[-1]
    make(tmp_path, [5], export="none", eval={"final_questions": 0})
    assert progress_of(run, [], []).pending == ["summary.json (written when a run ends)"]


def test_a_run_with_a_summary_is_finished(tmp_path):
    run = make(tmp_path, [3, 2])
    (run / "summary.json").write_text("{}")
    progress = progress_of(run, taken(run, [3, 2]), [])
    assert progress.finished
    assert progress.pending == []


def test_the_length_of_an_epoch_is_known_once_a_phase_of_it_is_over(tmp_path):
    run = make(tmp_path, [None, 4], rounds=2)
    first = progress_of(run, taken(run, [9]), [])
    assert (first.step, first.total, first.where) == (9, None, "round 1 perceiver, step 9")
    assert first.share is None
    later = progress_of(run, taken(run, [9, 1]), [])
    assert later.total == 2 * (9 + 4)
    (run / "summary.json").write_text("{}")
    assert progress_of(run, taken(run, [9, 4, 9, 4]), []).total == 26


def test_a_phase_that_ended_early_has_no_more_steps_than_it_took(tmp_path):
    """Known once another one follows, or the run is over."""
    run = make(tmp_path, [24, 12])
    assert progress_of(run, taken(run, [7]), []).total == 36
    progress = progress_of(run, taken(run, [7, 3]), [])
    first = progress.phases[0]
    assert (first.steps, first.done, first.share) == (7, 7, 1)
    assert (progress.total, progress.where) == (19, "round 1 reasoner, step 3 of 12")
    (run / "summary.json").write_text("{}")
    assert progress_of(run, taken(run, [7, 3]), []).total == 10


def test_without_a_configuration_the_step_is_all_there_is(tmp_path):
    progress = progress_of(tmp_path, taken(tmp_path, [5, 2]), [])
    assert (progress.step, progress.total, progress.phases) == (7, None, [])
    assert progress.where == "round 1 reasoner, step 2"


def test_an_evaluation_is_no_training_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: tiny\n")
    assert progress_of(tmp_path, [], []) is None


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{",
        "phases: 3",
        "phases: [1, {}]\nrounds: x",
        "rounds: 1e99\nphases: [{}]",
        "a: *b",
    ],
)
def test_no_configuration_breaks_it(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    notes: list[str] = []
    progress = progress_of(tmp_path, taken(tmp_path, [2]), notes)
    assert progress.step == 2
    assert bool(notes) == (text in ("[1, 2]", "{", "a: *b"))


def test_a_phase_given_in_epochs_is_as_long_as_the_run_has_said(tmp_path):
    run = make(tmp_path, [None, 12])
    rows = taken(run, [7])
    assert progress_of(run, rows, []).total is None
    (run / "schedule.json").write_text('{"steps": [24, 12]}\n')
    progress = progress_of(run, rows, notes := [])
    assert (progress.total, progress.where) == (36, "round 1 perceiver, step 7 of 24")
    assert notes == []
    (run / "schedule.json").write_text('{"steps": [24]}')  # of another config
    assert progress_of(run, rows, []).total is None
