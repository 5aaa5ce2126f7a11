"""The report's panel of phases and warnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from p2r_jax.evals import scoring
from p2r_jax.evals.report import write_report
from p2r_jax.evals.report_health import MAX_WARNINGS
from p2r_jax.evals.verdicts import phase_verdicts, spans_of
from tests.evals.report_page import Page, answer, write_jsonl

CONFIG = "phases: [{role: perceiver, steps: 10}, {role: reasoner, steps: 10}]\n"


def warning(step: int, **fields: Any) -> dict[str, Any]:
    return {
        "step": step,
        "phase": "reasoner",
        "round": 1,
        "phase_number": 2,
        "phase_step": step - 10,
        "rule": "kl",
        "metric": "kl/mean",
        "value": 0.61,
        "threshold": 0.5,
        "message": "The policy is far away: lower optimizer.learning_rate.",
        "action": "warn",
        **fields,
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """64 -> 82 -> 62 of 100 questions: before and after alone would show -2."""
    run = tmp_path / "collapsed"
    for name, right in (("before", 64), ("after_phase1_perceiver", 82), ("after", 62)):
        records = [answer(str(i), correct=int(i < right)) for i in range(100)]
        write_jsonl(run / f"eval/{name}.jsonl", *records)
        (run / f"eval/{name}.json").write_text(json.dumps(scoring.summarize_modes(name, records)))
    (run / "config.yaml").write_text(CONFIG)
    entries = phase_verdicts(run, spans_of(["perceiver", "reasoner"], 1))
    (run / "summary.json").write_text(json.dumps({"phases": entries, "warnings": 2}))
    write_jsonl(run / "warnings.jsonl", warning(14), warning(17, rule="truncated", value=0.3))
    return run


class TestPanel:
    def test_it_comes_first_and_says_how_each_phase_ended(self, run):
        page = Page(write_report(run))
        assert page.source.index('id="health"') < page.source.index('id="summary"')
        assert "round 1 reasoner ended worse than it began 2 warnings" in page.text
        assert "round 1 perceiver p2r 100 64.0 % 82.0 % +18.0" in page.text
        assert "better – round 1 reasoner p2r 100 82.0 % 62.0 % -20.0" in page.text
        assert "1.9e-06 worse 2" in page.text

    def test_a_phase_that_began_with_the_best_weights_is_judged_by_them(self, run):
        """Not by the end of the phase before."""
        records = [answer(str(i), correct=int(i < 90)) for i in range(100)]
        name = "phase2_reasoner_start"
        write_jsonl(run / f"eval/{name}.jsonl", *records)
        (run / f"eval/{name}.json").write_text(json.dumps(scoring.summarize_modes(name, records)))
        (run / "summary.json").unlink()
        text = Page(write_report(run)).text
        assert "round 1 reasoner p2r 100 90.0 % 62.0 % -28.0" in text

    def test_warnings_are_told_by_phase_with_what_to_do(self, run):
        text = Page(write_report(run)).text
        assert "Warnings, round 1 reasoner 2" in text
        assert "Warnings, round 1 perceiver" not in text
        assert "14 kl kl/mean 0.61 0.5 The policy is far away: lower optimizer" in text
        assert "17 truncated kl/mean 0.3 0.5" in text

    def test_the_headline_has_the_end_of_every_phase(self, run):
        tiles = Page(write_report(run)).text
        for name, value in (
            ("before", "64.0 %"),
            ("after_phase1_perceiver", "82.0 %"),
            ("after", "62.0 %"),
        ):
            assert f"p2r · {name} {value}" in tiles
        assert "-20.0 points, paired whole run: difference, paired -2.0 points" in tiles

    def test_a_phase_that_a_warning_ended_is_marked(self, run):
        write_jsonl(run / "warnings.jsonl", warning(14, action="stop_phase"))
        assert "round 1 reasoner ended early p2r" in Page(write_report(run)).text

    def test_a_run_in_its_second_phase_has_one_verdict(self, run):
        for name in ("eval/after.json", "eval/after.jsonl", "summary.json"):
            (run / name).unlink()
        text = Page(write_report(run)).text
        assert "better – round 1 reasoner – – – – – – – not judged yet 2" in text
        assert "ended worse" not in text

    def test_stored_verdicts_stand_in_for_records(self, run):
        shutil.rmtree(run / "eval")
        assert "100 82.0 % 62.0 % -20.0" in Page(write_report(run)).text

    def test_a_healthy_run_says_so(self, run):
        (run / "warnings.jsonl").write_text("")
        assert "no warnings" in Page(write_report(run)).text

    def test_a_run_of_an_earlier_version_was_not_watched(self, page):
        assert "This run was not watched" in page.text
        assert "no warnings" not in page.text

    def test_an_evaluation_has_no_panel(self, tmp_path):
        write_jsonl(tmp_path / "eval/x.jsonl", answer("a"))
        page = Page(write_report(tmp_path))
        assert 'id="health"' not in page.source
        assert "#health" not in page.source

    def test_of_very_many_warnings_the_first_are_shown(self, run):
        count = MAX_WARNINGS + 5
        write_jsonl(run / "warnings.jsonl", *(warning(10 + i) for i in range(count)))
        page = Page(write_report(run))
        assert f"The first {MAX_WARNINGS} of {count}." in page.text
        assert len(page.of_class("advice")) == MAX_WARNINGS


class TestUntrustedText:
    def test_is_escaped(self, run, hostile):
        names = ("rule", "metric", "message", "phase", "step", "value", "threshold", "round")
        write_jsonl(
            run / "warnings.jsonl",
            warning(14) | dict.fromkeys(names, hostile),
            warning(14) | dict.fromkeys(names, hostile) | {"phase_number": hostile},
        )
        (run / "config.yaml").write_text(json.dumps({"phases": [{"role": hostile}]}))
        page = Page(write_report(run))
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == 2
        assert "img" not in tags
        assert not any(name.startswith("on") for _, a in page.elements for name in a)
        assert page.text.count("onerror=alert(1)") >= 6

    @pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [[1]], float("nan"), True])
    def test_fields_of_any_type_do_not_break_the_page(self, run, junk):
        rows = [warning(14) | {name: junk} for name in warning(14)]
        write_jsonl(run / "warnings.jsonl", *rows, {}, junk)
        summary = json.loads((run / "summary.json").read_text())
        (entry, _) = summary["phases"]
        entries = [entry | {name: junk} for name in entry]
        shutil.rmtree(run / "eval")
        for phases in (junk, [junk], entries):
            (run / "summary.json").write_text(json.dumps(summary | {"phases": phases}))
            write_report(run, max_cards=1)
        (run / "config.yaml").unlink()
        write_report(run, max_cards=1)
