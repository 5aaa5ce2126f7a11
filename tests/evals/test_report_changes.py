"""Gain and harm on the page, against `default`, the first evaluation and another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2r_jax.cli import main
from p2r_jax.evals import scoring
from p2r_jax.evals.report import write_report
from tests.evals.report_page import Page, answer, write_jsonl


def cards(page: Page) -> dict[tuple[str, str, str], list[str]]:
    """Marks of each card, by evaluation, mode and what stands first in its question."""
    found = [a for tag, a in page.elements if tag == "article" and "data-verdict" in a]
    return {
        (a["data-eval"], a["data-mode"], a["data-verdict"]): json.loads(a.get("data-change", "[]"))
        for a in found
    }


def run(folder: Path, right: dict[str, bool], name: str = "x", **fields) -> Path:
    """One question, answered in several modes."""
    rows = [
        answer("q", mode=mode, correct=int(ok), prediction="AB"[not ok], **fields)
        for mode, ok in right.items()
    ]
    write_jsonl(folder / f"eval/{name}.jsonl", *rows)
    (folder / f"eval/{name}.json").write_text(json.dumps(scoring.summarize_modes(name, rows)))
    return folder


def test_against_default(tmp_path):
    page = Page(write_report(run(tmp_path, {"default": False, "p2r": True, "grid": False})))
    assert cards(page) == {
        ("x", "default", "wrong"): [],
        ("x", "p2r", "right"): ["gain over default"],
        ("x", "grid", "wrong"): [],
    }
    assert "gain over default" in page.text
    assert "default: B <answer>A</answer>" in page.text


def test_against_the_first_evaluation(tmp_path):
    run(tmp_path, {"p2r": True}, "before")
    page = Page(write_report(run(tmp_path, {"p2r": False}, "after")))
    assert cards(page) == {
        ("before", "p2r", "right"): [],
        ("after", "p2r", "wrong"): ["harm against before"],
    }


def test_against_another_run(tmp_path):
    other = run(tmp_path / "other", {"p2r": True, "default": False}, category="cross")
    own = run(tmp_path / "own", {"p2r": False, "default": True}, category="cross")
    page = Page(write_report(own, against=other))
    assert cards(page) == {
        ("x", "p2r", "wrong"): ["harm against other", "harm against default"],
        ("x", "default", "right"): ["gain over other"],
    }
    assert "other x p2r x p2r all 1 0 1 -100.0" in page.text
    assert "first those with other" in page.text


def test_another_run_is_compared_with_its_evaluation_of_the_same_name_else_the_newest(tmp_path):
    other = run(tmp_path / "other", {"p2r": True}, "before")
    run(other, {"p2r": False}, "after")
    own = run(tmp_path / "own", {"p2r": False}, "before")
    run(own, {"p2r": True}, "z")
    text = Page(write_report(own, against=other)).text
    assert "other before p2r before p2r all" in text
    assert "other after p2r z p2r all" in text


def test_the_command(tmp_path, capsys):
    other, own = (run(tmp_path / name, {"p2r": name == "own"}) for name in ("other", "own"))
    assert main(["report", str(own), "--against", str(other)]) == 0
    assert capsys.readouterr().out.strip() == str(own / "report.html")
    assert "gain over other" in Page(own / "report.html").text
    assert main(["report", str(own), "--against", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("p2r report: nothing to compare with in")


def test_a_run_without_evaluations_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing to compare with in .*empty"):
        write_report(run(tmp_path / "own", {"p2r": True}), against=tmp_path / "empty")


def test_runs_of_other_questions_are_noted(tmp_path):
    other = run(tmp_path / "other", {"p2r": True})
    write_jsonl(tmp_path / "own/eval/x.jsonl", answer("another"))
    text = Page(write_report(tmp_path / "own", against=other)).text
    assert "x p2r cannot be compared with other: no question id is on both sides" in text


def test_by_category(tmp_path):
    rows = [
        answer(f"q{i}", mode=mode, category="ab"[i % 2], correct=int(mode == "p2r" or i > 1))
        for i in range(6)
        for mode in ("default", "p2r")
    ]
    write_jsonl(tmp_path / "eval/x.jsonl", *rows)
    text = Page(write_report(tmp_path)).text
    assert "x default x p2r all 6 2 0 +33.3" in text
    assert "a 3 1 0 +33.3" in text
    assert "b 3 1 0 +33.3" in text


def test_rules_rotations_and_samples_have_tables(tmp_path):
    rows = [
        answer(f"q{q}-{r}", sample=s, cluster=q, image_hash=q, meta={"cycle_category": f"turn{r}"},
               reasoner_text="<answer>red</answer>", prediction=None, correct=0)
        for q in range(2) for r in range(2) for s in range(3)
    ]  # fmt: skip
    write_jsonl(tmp_path / "eval/x.jsonl", *rows)
    text = Page(write_report(tmp_path)).text
    at = text.index("The same answers by three rules")
    rules = text[at : text.index("Rotations of a question")]
    # Nothing for the authors; "red" is option A for the others.
    assert "x p2r 12 0.0 %" in rules
    assert "100.0 % 100.0 %" in rules  # its upper limit, and the share without an answer
    assert rules.count("100.0 % 34.2 % – 100.0 % 0.0 %") == 2
    assert "turn0 0.0 % turn1 0.0 %" in text
    assert "pass@k: one of k is right" in text
    assert "answer 3" in text
    assert "by image 0.0 – 0.0" in text


def test_a_file_that_says_what_a_run_depends_on_is_no_evaluation(tmp_path):
    run(tmp_path, {"p2r": True})
    described = {"modes": {"p2r": {"accuracy": 0.5, "low": 0, "high": 1, "n": 1}}}
    (tmp_path / "eval/x.run.json").write_text(json.dumps(described))
    assert "x.run" not in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [[1]], float("nan")])
def test_fields_of_any_type_do_not_break_the_page(tmp_path, junk):
    names = ("id", "mode", "sample", "cluster", "image_hash", "meta", "options", "answer")
    rows = [{**answer("a"), name: junk} for name in (*names, "reasoner_text", "correct")]
    write_jsonl(tmp_path / "own/eval/x.jsonl", *rows, answer("b"))
    write_jsonl(tmp_path / "other/eval/x.jsonl", *rows, answer("b"))
    write_report(tmp_path / "own", against=tmp_path / "other")
