"""The report of a run that goes on, was killed, or left half of what it should have written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from p2r_jax.evals import run_folder
from p2r_jax.evals.report import percent, write_report
from tests.evals.report_page import Page, answer, write_jsonl


class TestUnfinishedRuns:
    @pytest.fixture(scope="class")
    def killed(self, finished_run, tmp_path_factory) -> Path:
        """The run, killed at step 107 while it made a full evaluation that it had to repeat."""
        run = tmp_path_factory.mktemp("killed")
        for kept in ("samples", "images", "eval"):
            shutil.copytree(finished_run / kept, run / kept)
        shutil.copy(finished_run / "config.yaml", run)
        lines = (finished_run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:109]) + '{"step": 108, "rew')
        (run / "eval/after.json").unlink()
        records = (run / "eval/after.jsonl").read_text().splitlines(keepends=True)
        (run / "eval/after.jsonl").write_text("".join(records[:30]))
        return run

    def test_the_page_says_how_far_it_is_and_what_is_missing(self, killed):
        page = Page(write_report(killed))
        assert "unfinished step 107 of 120 (89 %) · round 1 reasoner, step 47 of 60" in page.text
        assert "Not written yet: evaluation after, summary.json (written when" in page.text
        assert "Not in this run folder" not in page.text
        assert "metrics.jsonl: 1 line is not a JSON object" in page.text
        (track,) = page.of_class("track")
        assert "round 1 reasoner: 47 of 60 steps" in track["aria-label"]

    def test_half_an_evaluation_is_shown_as_such_and_not_as_the_result(self, killed):
        page = Page(write_report(killed))
        assert "after unfinished default 24" in page.text
        assert "p2r · after_phase1_perceiver" in page.text
        assert "p2r · after " not in page.text
        assert "before p2r after_phase1_perceiver p2r all 24" in page.text
        assert "after p2r all 6" not in page.text  # 30 records: 24 of default, then 6 of p2r.

    def test_a_newer_short_evaluation_is_shown_beside_it(self, killed):
        assert "p2r · short, at step 100 71.3 % 61.3 % – 81.3 %" in Page(write_report(killed)).text

    def test_no_short_one_is_newer_than_the_last_full_one(self, page):
        assert "short, at step" not in page.text

    def test_a_page_can_be_made_before_anything_was_measured(self, finished_run, tmp_path):
        shutil.copy(finished_run / "config.yaml", tmp_path)
        page = Page(write_report(tmp_path))
        assert "unfinished step 0 of 120 (0 %)" in page.text
        assert "metrics.jsonl (training curves)" in page.text


class TestIncompleteRuns:
    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no run folder at .*nowhere"):
            write_report(tmp_path / "nowhere")

    def test_an_empty_folder_says_what_was_expected(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected at least one of summary.json"):
            write_report(tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "kept", ["summary.json", "metrics.jsonl", "config.yaml", "samples", "eval"]
    )
    def test_any_one_input_is_enough(self, finished_run, tmp_path, kept):
        source = finished_run / kept
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / kept)
        page = Page(write_report(tmp_path))
        missing = [n for n, use in run_folder.INPUTS.items() if f"{n} ({use})" in page.text]
        # An unfinished run writes its summary when it ends: that is named elsewhere.
        later = "summary.json (written when a run ends)" in page.text
        assert later == (kept in ("metrics.jsonl", "config.yaml"))
        assert len(missing) + later == 4
        assert not any(name.startswith(kept) for name in missing)

    def test_stored_summaries_stand_in_for_records(self, finished_run, tmp_path):
        (tmp_path / "eval").mkdir()
        shutil.copy(finished_run / "eval/after.json", tmp_path / "eval/after.json")
        page = Page(write_report(tmp_path))
        stored = json.loads((tmp_path / "eval/after.json").read_text())["modes"]["p2r"]
        assert percent(stored["accuracy"]) in page.text

    def test_a_half_written_line_is_skipped_and_reported(self, tmp_path):
        lines = [json.dumps({"step": s, "reward/mean": 0.1 * s}) for s in range(5)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "rew')
        page = Page(write_report(tmp_path))
        assert "metrics.jsonl: 1 line is not a JSON object, first at line 6" in page.text
        assert "unfinished step 4" in page.text

    def test_missing_and_broken_pictures_are_named(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"not a picture")
        write_jsonl(
            tmp_path / "eval/x.jsonl",
            answer("a", image="gone.png"),
            answer("b", image="broken.png"),
            answer("c", image=None),
        )
        text = Page(write_report(tmp_path)).text
        assert "gone.png: file not found" in text
        assert "broken.png: cannot identify" in text
        assert "No picture was saved" in text

    def test_records_that_cannot_be_scored_are_still_shown(self, tmp_path):
        write_jsonl(tmp_path / "eval/x.jsonl", answer("a", correct="yes"), answer("b"))
        text = Page(write_report(tmp_path)).text
        assert "eval/x.jsonl cannot be scored: ValueError: record 'a'" in text
        assert "2 answers" in text

    def test_answers_that_nothing_could_grade_count_nowhere_but_are_shown(self, tmp_path):
        write_jsonl(tmp_path / "eval/x.jsonl", answer("a", correct=None), answer("b"))
        page = Page(write_report(tmp_path))
        assert "cannot be scored" not in page.text
        assert "x unfinished 1 not graded p2r 1 100.0 %" in page.text
        verdicts = [a["data-verdict"] for tag, a in page.elements if "data-verdict" in a]
        assert sorted(verdicts) == ["not graded", "right"]

    @pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [[1]], float("nan")])
    def test_fields_of_any_type_do_not_break_the_page(self, tmp_path, junk):
        keys = list(answer("a"))
        write_jsonl(
            tmp_path / "eval/x.jsonl",
            *({**answer("a"), key: junk} for key in keys),
            {},
            {"id": junk},
        )
        names = ("step", "phase", "role", "id", "completion", "reward", "reward_parts", "boxes")
        write_jsonl(tmp_path / "samples/step_0.jsonl", *({n: junk} for n in names))
        write_jsonl(tmp_path / "metrics.jsonl", *({"step": 1, n: junk} for n in names))
        fields = ("before", "after", "stages", "seed")
        (tmp_path / "summary.json").write_text(json.dumps(dict.fromkeys(fields, junk)))
        write_report(tmp_path)
