"""Whether a phase ended better or worse than it began: the same questions, paired."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2r_jax.evals import scoring
from p2r_jax.evals.verdicts import (
    mode_that_counts,
    outcome,
    phase_verdicts,
    spans_of,
    verdict_of,
    verdict_rows,
)
from tests.evals.report_page import answer, write_jsonl


def write(run: Path, name: str, right: int, n: int = 100, *modes: str, first: int = 0) -> None:
    """An evaluation in which the first so many questions are answered right, in each mode."""
    records = [
        answer(str(i), mode=mode, correct=int(i < right), perceiver_text=None)
        for mode in modes or ("p2r",)
        for i in range(first, first + n)
    ]
    write_jsonl(run / f"eval/{name}.jsonl", *records)


@pytest.fixture
def two_phases(tmp_path) -> Path:
    """64 -> 82 -> 62 of 100."""
    for name, right in (("before", 64), ("after_phase1_perceiver", 82), ("after", 62)):
        write(tmp_path, name, right)
    return tmp_path


class TestSpans:
    def test_each_phase_begins_where_the_one_before_ended(self):
        spans = spans_of(["perceiver", "reasoner"], 2)
        assert [(s.number, s.round, s.start, s.end) for s in spans] == [
            (1, 1, "before", "after_phase1_perceiver"),
            (2, 1, "after_phase1_perceiver", "after_phase2_reasoner"),
            (3, 2, "after_phase2_reasoner", "after_phase3_perceiver"),
            (4, 2, "after_phase3_perceiver", "after"),
        ]

    def test_names_are_those_that_training_gives_its_evaluations(self):
        from p2r_jax.config import PhaseConfig, TrainConfig
        from p2r_jax.rl.evaluations import Evaluations
        from p2r_jax.rl.schedule import plan_phases

        roles = ["joint", "baseline"]
        own = [PhaseConfig(role=role, steps=1) for role in roles]
        phases = plan_phases(TrainConfig(phases=own, rounds=3), 64)
        name = Evaluations.name_after
        ends = [name(type("", (), {"phases": phases}), phase) for phase in phases]
        assert [span.end for span in spans_of(roles, 3)] == ends


class TestVerdicts:
    def test_of_a_phase_that_gained_and_of_one_that_lost(self, two_phases):
        first, second = phase_verdicts(two_phases, spans_of(["perceiver", "reasoner"], 1))
        assert (first["accuracy_start"], first["accuracy_end"]) == (0.64, 0.82)
        assert (first["verdict"], second["verdict"]) == ("better", "worse")
        assert (second["role"], second["mode"], second["n"]) == ("reasoner", "p2r", 100)
        assert second["difference"] == pytest.approx(-0.2)
        assert second["low"] < -0.2 < second["high"] < 0
        assert second["p_value"] == pytest.approx(scoring.mcnemar_p(0, 20))

    def test_of_a_small_change_there_is_none(self, tmp_path):
        write(tmp_path, "before", 64)
        write(tmp_path, "after", 61)
        (entry,) = phase_verdicts(tmp_path, spans_of(["joint"], 1))
        assert entry["verdict"] == "no clear change"
        assert entry["p_value"] == pytest.approx(0.25)

    def test_only_questions_of_both_sides_count(self, tmp_path):
        write(tmp_path, "before", 64)
        write(tmp_path, "after", 200, first=50)
        (entry,) = phase_verdicts(tmp_path, spans_of(["joint"], 1))
        assert entry["n"] == 50
        assert entry["accuracy_start"] == 14 / 50

    @pytest.mark.parametrize(
        "modes, counts",
        [
            (["default", "p2r", "oracle_box"], "p2r"),
            (["default", "baseline"], "baseline"),
            (["default", "crops_only"], "default"),
            ([], None),
        ],
    )
    def test_the_mode_is_the_one_that_is_trained(self, modes, counts):
        assert mode_that_counts(modes) == counts

    def test_a_mode_must_be_on_both_sides(self, tmp_path):
        write(tmp_path, "before", 64, 100, "default", "p2r")
        write(tmp_path, "after", 90, 100, "default", "oracle_box")
        (entry,) = phase_verdicts(tmp_path, spans_of(["perceiver"], 1))
        assert entry["mode"] == "default"

    def test_answers_that_nothing_could_grade_are_left_out(self, tmp_path):
        write(tmp_path, "before", 64)
        write(tmp_path, "after", 64)
        file = tmp_path / "eval/after.jsonl"
        file.write_text(file.read_text().replace('"correct": 0', '"correct": null', 6))
        (entry,) = phase_verdicts(tmp_path, spans_of(["perceiver"], 1))
        assert entry["n"] == 94

    def test_without_evaluations_there_is_the_phase_alone(self, tmp_path):
        (entry,) = phase_verdicts(tmp_path, spans_of(["perceiver"], 1))
        assert entry == {
            "number": 1,
            "round": 1,
            "role": "perceiver",
            "start": "before",
            "end": "after",
        }
        assert verdict_rows([entry]) == []
        assert outcome([entry], 0) == "finished."

    def test_no_difference_is_none_whatever_the_test_says(self):
        assert verdict_of({"difference": 0.0, "mcnemar_p": 0.01}) == "no clear change"

    def test_a_phase_that_began_with_other_weights_is_judged_by_its_own_start(self, two_phases):
        """80 of 100 at step 20, 70 at the phase's end; the next one began with those of step 20."""
        write(two_phases, "after_phase1_perceiver", 70)
        write(two_phases, "phase2_reasoner_start", 82)
        _, second = phase_verdicts(two_phases, spans_of(["perceiver", "reasoner"], 1))
        assert second["start"] == "phase2_reasoner_start"
        assert (second["accuracy_start"], second["accuracy_end"]) == (0.82, 0.62)
        assert second["verdict"] == "worse"


class TestWhatIsSaid:
    def test_the_table_has_every_phase(self, two_phases):
        entries = phase_verdicts(two_phases, spans_of(["perceiver", "reasoner"], 1))
        table = scoring.format_table(verdict_rows(entries))
        assert "1 perceiver  p2r   100     64.0   82.0   +18.0" in table
        assert table.splitlines()[-1].endswith("worse")

    def test_the_last_line_says_that_a_phase_ended_worse(self, two_phases):
        entries = phase_verdicts(two_phases, spans_of(["perceiver", "reasoner"], 1))
        assert outcome(entries, 5) == (
            "finished, but phase 2 (round 1 reasoner) ended worse than it began: p2r 82.0% -> "
            "62.0% on the same 100 questions, p = 1.9e-06. 5 warnings were given on the way: "
            "warnings.jsonl and the report."
        )
        assert outcome(entries[:1], 1) == (
            "finished. 1 warning was given on the way: warnings.jsonl and the report."
        )
