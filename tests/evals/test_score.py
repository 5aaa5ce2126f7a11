"""Scoring again from saved records: reading, grading anew, tables and files, `p2r score`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from p2r_jax.cli import main
from p2r_jax.evals import scoring
from p2r_jax.evals.score import read_records, regrade, score_file

COLORS = ["red", "blue", "green", "dark brown"]


def record(id_: str, said: str = "B", mode: str = "p2r", **fields: Any) -> dict[str, Any]:
    """An answer to a question whose answer is B, graded as it was when it was answered."""
    return {
        "id": id_,
        "mode": mode,
        "sample": 0,
        "category": "single",
        "question": "Which?",
        "options": COLORS,
        "answer": "B",
        "prediction": said,
        "correct": float(said == "B"),
        "perceiver_text": None if mode == "default" else "[]",
        "parse_ok": None if mode == "default" else True,
        "boxes": [],
        "true_boxes": [],
        "reasoner_text": said if mode == "default" else f"<think>A</think><answer>{said}</answer>",
        "image": None,
        "crops": [],
        **fields,
    }


def write(path: Path, *records: Any, end: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return path


def scored(path: Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], str]:
    """What scoring returns and prints."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    result = score_file(path, *args, console=console, **kwargs)
    return result, printed.getvalue()


def rotations(says: dict[str, str], questions: int = 3) -> list[dict[str, Any]]:
    """Four rotations of each question; `says`: by mode, what is said to all of them in turn."""
    return [
        record(f"hr-{q}-{r}", said[(4 * q + r) % len(said)], mode,
               cluster=f"hr-{q}", image_hash=f"h{q}", meta={"cycle_category": f"cycle{r}"},
               category=("single", "cross")[q % 2])
        for mode, said in says.items() for q in range(questions) for r in range(4)
    ]  # fmt: skip


class TestReading:
    def test_a_half_written_last_line_is_counted_and_left_out(self, tmp_path):
        reading = read_records(write(tmp_path / "a.jsonl", record("q0"), end='{"id": "q1", "mo'))
        assert [r["id"] for r in reading.records] == ["q0"]
        assert (reading.damaged, reading.repeated) == (1, 0)

    @given(cut=st.integers(1, 1200))
    def test_a_file_cut_anywhere_keeps_its_whole_lines(self, tmp_path_factory, cut):
        path = tmp_path_factory.mktemp("cut") / "a.jsonl"
        whole = [json.dumps(record(f"q{i}")) + "\n" for i in range(2)]
        text = "".join(whole)[:-cut]
        path.write_text(text)
        reading = read_records(path)
        kept = text.count("\n")
        # Only the end of its line may be missing from a record.
        complete = (
            bool(text)
            and not text.endswith("\n")
            and text.endswith("}")
            and cut in (1, len(whole[1]) + 1)
        )
        assert len(reading.records) == kept + complete
        assert reading.damaged == (bool(text) and not text.endswith("\n") and not complete)

    def test_a_damaged_line_before_the_last_is_named(self, tmp_path):
        path = write(tmp_path / "a.jsonl", record("q0"))
        path.write_text('{"id": \n' + path.read_text())
        with pytest.raises(ValueError, match=r"a.jsonl, line 1: not a JSON object"):
            read_records(path)

    def test_equal_duplicates_are_one_record_and_counted(self, tmp_path):
        again = record("q0", image="elsewhere.jpg", crops=["c.jpg"])
        reading = read_records(write(tmp_path / "a.jsonl", record("q0"), record("q1"), again))
        assert [r["id"] for r in reading.records] == ["q0", "q1"]
        assert reading.records[0]["image"] == "elsewhere.jpg"
        assert reading.repeated == 1

    def test_duplicates_that_differ_are_named(self, tmp_path):
        path = write(tmp_path / "a.jsonl", record("q0"), record("q0", "C"))
        with pytest.raises(ValueError, match=r"line 2: another record of id 'q0', mode 'p2r', sam"):
            read_records(path)

    def test_modes_and_samples_are_no_duplicates(self, tmp_path):
        rows = [record("q0"), record("q0", mode="default"), record("q0", sample=1)]
        assert len(read_records(write(tmp_path / "a.jsonl", *rows)).records) == 3

    def test_what_is_no_record_is_named(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"step": 1}, record("q0"))
        with pytest.raises(ValueError, match="line 1: no id and no mode"):
            read_records(path)

    def test_a_missing_file_names_those_that_are_there(self, tmp_path):
        write(tmp_path / "after.jsonl", record("q0"))
        with pytest.raises(FileNotFoundError, match=r"before.jsonl: there is .*after.jsonl"):
            read_records(tmp_path / "before.jsonl")
        with pytest.raises(FileNotFoundError, match=r"there is .*after.jsonl"):
            read_records(tmp_path)


class TestRegrading:
    def test_letters_are_graded_by_the_authors_rule(self):
        stale = record("q0", "blue", correct=1.0, prediction="B")
        (graded,), changed = regrade([stale])
        assert (graded["correct"], graded["prediction"], changed) == (0.0, None, 1)
        assert stale["correct"] == 1.0

    def test_other_answers_keep_their_verdict(self):
        number = record("q0", "12", answer="12", correct=1.0)
        free = record("q1", "a cup", answer="A", answer_form="free_form", correct=None)
        assert regrade([number, free]) == ([number, free], 0)

    def test_what_nothing_graded_can_be_graded_now(self):
        (graded,), changed = regrade([record("q0", correct=None)])
        assert (graded["correct"], changed) == (1.0, 1)


class TestScoring:
    def test_a_file_of_several_modes(self, tmp_path):
        rows = rotations({"default": "BA", "p2r": "BBBBBBBA"})
        path = write(tmp_path / "hr.jsonl", *rows, end="{")
        result, printed = scored(path)
        p2r = result["modes"]["p2r"]
        own = [r for r in rows if r["mode"] == "p2r"]
        assert p2r == scoring.summarize(own)
        assert p2r["all_rotations"]["accuracy"] == pytest.approx(2 / 3)
        (pair,) = result["comparisons"]
        assert (pair["a"]["mode"], pair["b"]["mode"]) == ("default", "p2r")
        assert (pair["gain"], pair["harm"], pair["clusters"]) == (5, 0, 3)
        for text in (
            "the same answers by three rules",
            "rotations of a question",
            "default  p2r  cross",
            "1 last line was half written",
        ):
            assert text in printed, printed
        assert json.loads((tmp_path / "score/hr.json").read_text()) == result

    def test_the_tables_as_csv(self, tmp_path):
        path = write(tmp_path / "hr.jsonl", *rotations({"default": "BA", "p2r": "BBBBBBBA"}))
        result, _ = scored(path, out=tmp_path / "out")
        with (tmp_path / "out/hr.csv").open() as file:
            rows = {(r["mode"], r["category"], r["figure"]): r for r in csv.DictReader(file)}
        p2r = result["modes"]["p2r"]
        row = rows["p2r", "all", "accuracy"]
        assert (float(row["value"]), row["n"]) == (p2r["accuracy"], "12")
        assert float(row["low"]) == p2r["low"]
        assert float(row["bootstrap_high"]) == p2r["bootstrap_high"]
        assert float(rows["p2r", "all", "rotation cycle3"]["value"]) == pytest.approx(2 / 3)
        assert float(rows["p2r", "all", "all rotations"]["value"]) == pytest.approx(2 / 3)
        assert {"accuracy lmms_eval", "no answer vlmevalkit"} <= {f for _, _, f in rows}
        assert ("p2r", "cross", "accuracy") in rows
        with (tmp_path / "out/hr_compared.csv").open() as file:
            compared = list(csv.DictReader(file))
        assert [r["category"] for r in compared] == ["all", "cross", "single"]
        assert compared[0]["gain"] == "5"

    def test_against_another_run(self, tmp_path):
        here = write(tmp_path / "here.jsonl", record("q0"), record("q1"), record("q2", "A"))
        there = write(tmp_path / "there.jsonl", record("q0", "A"), record("q1"), record("q9"))
        result, printed = scored(here, there)
        (pair,) = result["comparisons"]
        assert (pair["gain"], pair["harm"], pair["n"], pair["only_a"], pair["only_b"]) == (
            1,
            0,
            2,
            1,
            1,
        )
        assert pair["a"] == {"file": "there", "mode": "p2r"}
        assert "there p2r  here p2r" in printed
        assert result["against"]["records"] == 3

    def test_files_of_one_name_are_told_apart(self, tmp_path):
        for run in ("first", "second"):
            (tmp_path / run / "eval").mkdir(parents=True)
            write(tmp_path / run / "eval/after.jsonl", record("q0"))
        first, second = (tmp_path / run / "eval/after.jsonl" for run in ("first", "second"))
        result, printed = scored(second, first)
        (pair,) = result["comparisons"]
        assert (pair["a"]["file"], pair["b"]["file"]) == ("first/after", "second/after")
        assert "first/after p2r  second/after p2r" in printed

    def test_sampled_answers(self, tmp_path):
        rows = [
            record(f"q{q}", s, sample=i)
            for q, said in enumerate(("BA", "AA"))
            for i, s in enumerate(said)
        ]
        result, printed = scored(write(tmp_path / "a.jsonl", *rows))
        assert result["modes"]["p2r"]["sampled"]["pass"]["2"]["accuracy"] == 0.5
        assert "pass@k" in printed

    def test_only_some_modes(self, tmp_path):
        path = write(tmp_path / "hr.jsonl", *rotations({"default": "BA", "p2r": "B"}))
        result, _ = scored(path, modes=["p2r"])
        assert list(result["modes"]) == ["p2r"]
        assert result["comparisons"] == []
        assert not (tmp_path / "score/hr_compared.csv").exists()
        with pytest.raises(ValueError, match="no mode grid: it has default, p2r"):
            scored(path, modes=["grid"])

    def test_runs_without_a_common_mode(self, tmp_path):
        a = write(tmp_path / "a.jsonl", record("q0"))
        b = write(tmp_path / "b.jsonl", record("q0", mode="default"))
        with pytest.raises(ValueError, match="share no mode: p2r, default"):
            scored(a, b)

    def test_ungraded_answers_count_nowhere(self, tmp_path):
        free = {"answer": "a cup", "options": [], "answer_form": "free_form"}
        rows = [record("q0", correct=None, **free), record("q1", correct=1.0, **free)]
        result, printed = scored(write(tmp_path / "a.jsonl", *rows))
        assert (result["ungraded"], result["modes"]["p2r"]["n"]) == (1, 1)
        assert "rules" not in result["modes"]["p2r"]
        assert "1 answer(s) that nothing could grade" in printed
        with pytest.raises(ValueError, match="no graded record"):
            scored(write(tmp_path / "b.jsonl", rows[0]))

    def test_a_mode_that_was_asked_other_questions_is_not_compared(self, tmp_path):
        rows = [record("q0", mode="default"), record("q1", mode="oracle_box")]
        assert scored(write(tmp_path / "a.jsonl", *rows))[0]["comparisons"] == []


class TestCommand:
    def test_prints_and_writes(self, tmp_path, capsys):
        path = write(tmp_path / "hr.jsonl", *rotations({"default": "BA", "p2r": "B"}))
        assert (
            main(["score", str(path), "--mode", "p2r", "default", "--out", str(tmp_path / "o")])
            == 0
        )
        assert "gain (wrong to right)" in capsys.readouterr().out
        assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
            "hr.csv", "hr.json", "hr_compared.csv",
        ]  # fmt: skip

    def test_bad_input_is_one_line(self, tmp_path, capsys):
        path = write(tmp_path / "a.jsonl", record("q0"), record("q0", "C"))
        assert main(["score", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("p2r score: ")
        assert "line 2: another record of id 'q0'" in line
        assert main(["score", str(tmp_path / "none.jsonl")]) == 2
