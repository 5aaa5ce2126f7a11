"""Evaluation of one set of weights: what each mode asks for, and the records it leaves."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from p2r_jax.config import BucketConfig, EvalConfig, MeshConfig, VerifierConfig
from p2r_jax.data.loader import LoadedRow, evaluation_batches
from p2r_jax.data.rows import Row
from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.evals import launch, scoring
from p2r_jax.evals.launch import run_evaluation
from p2r_jax.evals.modes import MODES
from p2r_jax.evals.record_file import EvalWriter
from p2r_jax.evals.runner import Decoding, evaluate
from p2r_jax.qwen3_vl.hf import load_pretrained
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.answers import choice_letters
from p2r_jax.roles.grading import Grader
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.pipeline import Completion, Pipeline
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets
from p2r_jax.rollout.generate import Schedule

DECODING = Decoding.of(perceiver=7, reasoner=6, direct=5)
SOURCE = VisualSearch("test")


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return nnx.split(load_pretrained(tiny_checkpoint, dtype="float32"), nnx.Param)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint, model):
    processor = Processor.from_pretrained(tiny_checkpoint)
    buckets = Buckets(patches=(320,), prompt_tokens=(160,), canvas=(96,), image=(384,))
    prompts = load_prompt_set("tiny")
    return Pipeline.create(model[0], processor, prompts, buckets, schedule=Schedule(4))


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model: perceivers write `boxes`, others `answer`; keeps the requests."""

    class Script:
        boxes = '[{"bbox_2d":[100,100,200,200],"label":"red tile"}]'
        answer = "<think>2</think><answer>A</answer>"

        def __init__(self):
            self.calls = []

        def __call__(self, pipeline, params, requests, images, sampling, seeds=None):
            texts = [pipeline.builder.processor.tokenizer.decode(r.tokens) for r in requests]
            self.calls.append((requests, texts, sampling.max_new_tokens))
            written = [self.boxes if "Find: " in text else self.answer for text in texts]
            return [Completion(text, ()) for text in written]

    script = Script()
    monkeypatch.setattr(Pipeline, "complete", lambda *args: script(*args))
    return script


def run(pipeline, rows, modes, **options):
    batches = [[LoadedRow(row, row.load_image()) for row in rows]]
    return evaluate(pipeline, None, lambda _: batches, modes, DECODING, total=len(rows), **options)


# --- modes ------------------------------------------------------------------------------------


def test_an_unknown_mode_is_named_before_any_work(pipeline):
    with pytest.raises(ValueError, match=r"unknown evaluation mode.*\['p2rr'\].*oracle_box"):
        evaluate(pipeline, None, lambda _: [], ["p2r", "p2rr"], DECODING, total=0)


@pytest.mark.parametrize(
    "mode, words, limits, views",
    [
        ("default", ["Say: "], [5], [1]),
        ("baseline", ["Whole: "], [6], [1]),
        ("p2r", ["Find: ", "Zoomed: "], [7, 6], [1, 2]),
        ("oracle_box", ["Zoomed: "], [6], [2]),
        ("random_box", ["Find: ", "Zoomed: "], [7, 6], [1, 2]),
        ("grid", ["Zoomed: "], [6], [5]),
        ("annotated_only", ["Find: ", "Zoomed: "], [7, 6], [1, 1]),
        ("crops_only", ["Find: ", "Zoomed: "], [7, 6], [1, 1]),
        ("p2r:crops=0", ["Find: ", "Whole: "], [7, 6], [1, 1]),
    ],
)
def test_each_mode_asks_its_roles(pipeline, scripted, mode, words, limits, views):
    row = SOURCE[0]
    run(pipeline, [row], [mode])
    for (requests, texts, limit), word, expected, shown in zip(
        scripted.calls, words, limits, views, strict=True
    ):
        assert f"{word}{row.question_with_options}" in texts[0]
        assert limit == expected
        assert len(requests[0].views) == shown


def test_oracle_boxes_are_the_true_ones(pipeline, scripted):
    (record,) = run(pipeline, [SOURCE[3]], ["oracle_box"])
    assert [tuple(b["bbox_2d"]) for b in record["boxes"]] == list(SOURCE[3].boxes)


def test_rows_without_true_boxes_are_left_out_of_box_modes(pipeline, scripted):
    image = np.zeros((64, 64, 3), np.uint8)
    bare = Row("bare", "red?", "A", "mca", ("a", "b"), image_source=image)
    records = run(pipeline, [bare, SOURCE[0]], ["default", "oracle_box", "random_box"])
    assert [(r["mode"], r["id"] == "bare") for r in records] == [
        ("default", True),
        ("default", False),
        ("oracle_box", False),
        ("random_box", True),
        ("random_box", False),
    ]
    assert run(pipeline, [bare], ["oracle_box"]) == []


# --- live and frozen weights ------------------------------------------------------------------


class TestLiveModes:
    """One role by the weights that learn, the other by the snapshot: it shows which one drifts."""

    @pytest.fixture
    def played(self, monkeypatch):
        """What each role was played by, in the order of the calls."""
        played = []

        def complete(pipeline, params, requests, images, sampling, seeds=None):
            text = pipeline.builder.processor.tokenizer.decode(requests[0].tokens)
            perceiver = "Find: " in text
            played.append(("perceiver" if perceiver else "reasoner", params))
            # A box for each of the weights, so that answers depend on who perceived.
            corner = 100 if params == "live" else 500
            box = [corner, corner, corner + 100, corner + 100]
            written = json.dumps([{"bbox_2d": box, "label": "tile"}])
            return [Completion(written if perceiver else f"by {params}", ()) for _ in requests]

        monkeypatch.setattr(Pipeline, "complete", complete)
        return played

    def evaluate(self, pipeline, modes, batches=1, partner="frozen"):
        rows = [[LoadedRow(SOURCE[i], SOURCE[i].load_image())] for i in range(batches)]
        return evaluate(
            pipeline, "live", lambda _: rows, modes, DECODING, total=batches, partner=partner
        )

    @pytest.mark.parametrize(
        "mode, perceiver, reasoner",
        [
            ("p2r", "live", "live"),
            ("live_perceiver", "live", "frozen"),
            ("live_reasoner", "frozen", "live"),
        ],
    )
    def test_who_plays_which_role(self, pipeline, played, mode, perceiver, reasoner):
        (record,) = self.evaluate(pipeline, [mode])
        assert played == [("perceiver", perceiver), ("reasoner", reasoner)]
        assert record["mode"] == mode
        assert record["reasoner_text"] == f"by {reasoner}"
        corner = 100 if perceiver == "live" else 500
        assert record["boxes"][0]["bbox_2d"][0] == corner
        assert f"[{corner}" in record["perceiver_text"]

    def test_a_perceiver_writes_once_for_all_modes_of_a_batch(self, pipeline, played):
        modes = ["live_reasoner", "p2r", "live_perceiver"]
        records = self.evaluate(pipeline, modes, batches=2)
        once = [
            ("perceiver", "frozen"),
            ("reasoner", "live"),
            ("perceiver", "live"),
            ("reasoner", "live"),
            ("reasoner", "frozen"),
        ]
        assert played == once * 2
        assert [r["boxes"][0]["bbox_2d"][0] for r in records] == [500, 100, 100] * 2

    def test_boxes_are_measured_as_in_p2r(self, pipeline, played):
        records = self.evaluate(pipeline, ["p2r", "live_perceiver"])
        figures = [{k: r[k] for k in ("hit", "iou", "area")} for r in records]
        assert figures[0] == figures[1]
        assert None not in figures[0].values()
        modes = scoring.summarize_modes("x", json.loads(json.dumps(records)))["modes"]
        assert modes["live_perceiver"]["perceiver_n"] == 1
        assert modes["live_perceiver"]["hit_rate"] is not None

    def test_without_frozen_weights_they_are_unknown(self, pipeline):
        with pytest.raises(ValueError, match=r"unknown evaluation mode.*\['live_reasoner'\]"):
            self.evaluate(pipeline, ["p2r", "live_reasoner"], partner=None)


# --- grading ----------------------------------------------------------------------------------


def row(answer: str, form: str = "mca", options=("a", "b", "c", "d")) -> Row:
    image = np.zeros((64, 64, 3), np.uint8)
    return Row("row", "red?", answer, form, tuple(options), ((0, 0, 500, 500),), "", image)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "shuffled_box"])
@pytest.mark.parametrize(
    "answer, in_default, elsewhere",
    [("<answer>B</answer>", 1.0, 1.0), ("B", 1.0, 0.0), ("<answer>C</answer>", 0.0, 0.0)],
)
def test_only_a_direct_answer_needs_no_tag(pipeline, scripted, mode, answer, in_default, elsewhere):
    scripted.answer = answer
    (record,) = run(pipeline, [row("B")], [mode])
    assert record["correct"] == (in_default if mode == "default" else elsewhere)
    if "<answer>" in answer:
        assert record["prediction"] == answer[8]
    else:
        assert record["prediction"] == ("B" if mode == "default" else None)


def test_letters_are_those_of_the_options(pipeline, scripted):
    assert choice_letters(4, "B") == "ABCD"
    assert choice_letters(0, "B") == "ABCDE"
    assert choice_letters(0, "F") == "ABCDEF"
    assert choice_letters(0, "42") == "ABCDE"
    scripted.answer = "<answer>F</answer>"
    (record,) = run(pipeline, [row("F", options="abcdef")], ["p2r"])
    assert (record["correct"], record["prediction"]) == (1.0, "F")


def test_numbers_are_graded_as_numbers(pipeline, scripted):
    scripted.answer = "<answer>1/2</answer>"
    (record,) = run(pipeline, [row("0.5", "na", ())], ["p2r"])
    assert (record["correct"], record["prediction"]) == (1.0, "1/2")


def test_what_cannot_be_graded_is_counted_and_left_out(pipeline, scripted, tmp_path):
    scripted.answer = "<answer>1/2</answer>"
    writer = EvalWriter(tmp_path, "odd", pictures=0)
    records = run(
        pipeline, [row("no number", "na", ()), row("0.5", "na", ())], ["p2r"], on_record=writer
    )
    assert [r["correct"] for r in records] == [None, 1.0]
    summary = writer.finish(records)
    assert summary["ungraded"] == 1
    assert summary["modes"]["p2r"]["n"] == 1


def question(answer: str, name: str = "q", form: str = "free_form") -> Row:
    image = np.zeros((64, 64, 3), np.uint8)
    return Row(name, f"what? {name}", answer, form, (), ((0, 0, 500, 500),), "", image)


class Judge:
    """Says yes to what begins with r, no to what begins with w, and fails on the rest."""

    collective = False

    def __init__(self):
        self.calls = []

    def __call__(self, queries):
        self.calls.append([(q.question, q.answer, q.response) for q in queries])
        return [{"r": True, "w": False}.get(q.response[:1]) for q in queries]


def test_a_batch_is_judged_in_one_call_for_each_mode(pipeline, scripted):
    scripted.answer = "<answer>right</answer>"
    judge, rows = Judge(), [question("a", "one"), row("B"), question("b", "two")]
    records = run(pipeline, rows, ["default", "p2r"], grader=Grader(judge))
    assert [r["correct"] for r in records] == [1.0, 0.0, 1.0] * 2
    assert [r["prediction"] for r in records[:3:2]] == ["right"] * 2
    assert judge.calls == [[("what? one", "a", "right"), ("what? two", "b", "right")]] * 2


@pytest.mark.parametrize(
    "answer, direct, tagged",
    [
        ("right", (1.0, "right"), (0.0, None)),
        ("<answer>wrong</answer>", (0.0, "wrong"), (0.0, "wrong")),
        ("<answer>unclear</answer>", (None, "unclear"), (None, "unclear")),
    ],
)
def test_free_text_has_the_same_rules_and_failures_are_ungraded(
    pipeline, scripted, answer, direct, tagged
):
    scripted.answer = answer
    records = run(pipeline, [question("a")], ["default", "p2r"], grader=Grader(Judge()))
    assert [(r["correct"], r["prediction"]) for r in records] == [direct, tagged]


def test_free_text_without_a_verifier_is_refused(pipeline, scripted):
    with pytest.raises(ValueError, match="only a verifier can grade"):
        run(pipeline, [question("a")], ["default"])


# --- the verifier of `p2r eval` ---------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path, tiny_checkpoint):
    """evaluation(form, verifier settings) -> EvalConfig of two questions about one picture."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "picture.png")

    def make(form="free_form", **settings):
        truth = {"free_form": "red mug", "na": "7"}[form]
        rows = [
            {"image": "picture.png", "question": q, "answer": truth, "answer_form": form}
            for q in ("one?", "two?")
        ]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return EvalConfig(
            model=str(tiny_checkpoint),
            benchmark=str(file),
            modes=["default"],
            pictures=0,
            out=str(tmp_path / "out"),
            verifier=VerifierConfig(**settings),
            mesh=MeshConfig(fsdp=8),
            buckets=BucketConfig(patches=[320], prompt_tokens=[160, 640], canvas=[96], image=[384]),
        )

    return make


def accuracy(summary):
    return summary["modes"]["default"]["accuracy"], summary["ungraded"]


def test_the_settings_choose_the_verifier(evaluation, scripted):
    scripted.answer = "a mug that is red"
    config = evaluation(kind="callable", function=f"{__name__}:mentions_red")
    assert accuracy(run_evaluation(config)) == (1.0, 0)


def mentions_red(question, answer, response):
    return question in ("one?", "two?") and answer == "red mug" and "red" in response


def test_a_verifier_that_is_passed_in_comes_first(evaluation, scripted):
    scripted.answer, judge = "wrong", Judge()
    config = evaluation(kind="callable", function=f"{__name__}:mentions_red")
    assert accuracy(run_evaluation(config, judge)) == (0.0, 0)
    assert judge.calls == [[("one?", "red mug", "wrong"), ("two?", "red mug", "wrong")]]


UNREACHABLE = {"kind": "endpoint", "base_url": "nonsense", "model": "m", "attempts": 1}


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({}, "'free_form', which only a verifier can grade"),
        (UNREACHABLE, r"verifier\.base_url nonsense"),
        ({"kind": "callable", "function": "json:nothing"}, r"verifier\.function"),
        ({"kind": "callable"}, r"verifier\.function must be set"),
    ],
    ids=lambda value: value.get("kind", "none") if isinstance(value, dict) else "",
)
def test_what_cannot_judge_is_refused_before_weights_are_read(
    evaluation, monkeypatch, settings, complaint
):
    def read(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(launch, "load_pretrained", read)
    with pytest.raises(ValueError, match=complaint):
        run_evaluation(evaluation(**settings))


def test_a_verifier_without_work_need_not_be_there(evaluation, scripted):
    scripted.answer = "7"
    assert accuracy(run_evaluation(evaluation("na", **UNREACHABLE))) == (1.0, 0)


def test_a_model_may_judge_itself(evaluation, monkeypatch):
    asked = []

    def complete(pipeline, params, requests, images, sampling, seeds=None):
        texts = [pipeline.builder.processor.tokenizer.decode(r.tokens) for r in requests]
        asked.append((params, [len(r.views) for r in requests]))
        judging = all("<student>" in text for text in texts)
        return [Completion("yes" if judging else "a mug", ()) for _ in requests]

    monkeypatch.setattr(Pipeline, "complete", complete)
    assert accuracy(run_evaluation(evaluation(kind="model"))) == (1.0, 0)
    # The trivial question of the check, the answers, the judgements; by the same weights.
    assert [views for _, views in asked] == [[0], [1, 1], [0, 0]]
    assert all(params is asked[0][0] for params, _ in asked)


def test_a_model_that_cannot_judge_is_refused(evaluation):
    with pytest.raises(ValueError, match="this model cannot judge"):
        run_evaluation(evaluation(kind="model"))


# --- records ----------------------------------------------------------------------------------


def test_records_are_what_scoring_reads(pipeline, scripted):
    records = run(pipeline, [SOURCE[i] for i in range(4)], MODES)
    # What needs another question's boxes comes after all others.
    ordered = sorted(MODES, key=lambda mode: mode == "shuffled_box")
    assert [r["mode"] for r in records] == [m for m in ordered for _ in range(4)]
    modes = scoring.summarize_modes("x", json.loads(json.dumps(records)))["modes"]
    assert set(modes) == set(MODES)
    for mode, summary in modes.items():
        assert summary["n"] == 4
        perceives = mode in ("p2r", "annotated_only", "crops_only")
        assert summary["perceiver_n"] == (4 if perceives else 0)
        assert (summary["hit_rate"] is not None) == perceives
    assert modes["p2r"]["parse_ok_rate"] == 1.0
    assert modes["default"]["parse_ok_rate"] is None
    assert modes["oracle_box"]["boxes_per_sample"] == 1.0


def test_malformed_boxes_show_in_the_record_and_nothing_else(pipeline, scripted):
    scripted.boxes = "no boxes here"
    (record,) = run(pipeline, [SOURCE[0]], ["p2r"])
    assert (record["boxes"], record["parse_ok"], record["hit"]) == ([], False, False)
    assert record["perceiver_text"] == "no boxes here"
    assert "Whole: " in scripted.calls[-1][1][0]


def test_the_writer_leaves_records_pictures_and_summary(pipeline, scripted, tmp_path):
    writer = EvalWriter(tmp_path, "after", pictures=1)
    records = run(pipeline, [SOURCE[0], SOURCE[1]], ["default", "p2r"], on_record=writer)
    summary = writer.finish(records)
    lines = (tmp_path / "eval/after.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert json.loads((tmp_path / "eval/after.json").read_text()) == summary
    pictured = [r for r in records if r["image"]]
    assert [(r["mode"], len(r["crops"])) for r in pictured] == [("default", 0), ("p2r", 1)]
    assert all((tmp_path / r["image"]).is_file() for r in pictured)
    assert all((tmp_path / crop).is_file() for r in pictured for crop in r["crops"])


def test_the_real_model_runs_every_mode_and_batches_change_nothing(pipeline, model):
    """Five questions in batches of 5 and of 2, the last one short."""
    runs = [
        evaluate(
            pipeline,
            model[1],
            lambda _, batch=batch: evaluation_batches(SOURCE, batch, 5),
            ["p2r", "random_box", "shuffled_box"],
            DECODING,
            total=5,
        )
        for batch in (5, 2)
    ]
    by_question = [
        {(r["id"], r["mode"]): (r["perceiver_text"], r["reasoner_text"]) for r in records}
        for records in runs
    ]
    assert len(runs[0]) == 15
    assert by_question[0] == by_question[1]


# --- images that rows share, and batches that are too large for the devices -------------------


@pytest.fixture
def rotations():
    """Two questions, each asked twice about one image, as a prepared dataset has them."""

    def row(i):
        about = SOURCE[i // 2]
        known = f"{i // 2:064x}"
        return dataclasses.replace(
            SOURCE[i], image_source=about.image_source, image_hash=known, meta={"image_hash": known}
        )

    return [row(i) for i in range(4)]


def uploads(monkeypatch):
    """Shapes of what is uploaded."""
    shapes, of_rows = [], ImageStore.of_rows

    def upload(*args, **kwargs):
        store = of_rows(*args, **kwargs)
        shapes.append(store.pixels.shape)
        return store

    monkeypatch.setattr(ImageStore, "of_rows", upload)
    return shapes


def answers(records) -> list[tuple]:
    return [(r["id"], r["mode"], r["perceiver_text"], r["reasoner_text"]) for r in records]


def test_rows_that_share_an_image_upload_it_once_and_are_answered_apart(
    pipeline, model, rotations, monkeypatch
):
    alone = [
        record
        for mode in ("p2r", "grid")
        for row in rotations
        for record in evaluate(
            pipeline, model[1], lambda _, row=row: [[LoadedRow(row, row.load_image())]], [mode],
            DECODING, total=1,
        )
    ]  # fmt: skip
    shapes = uploads(monkeypatch)
    batch = [LoadedRow(row, row.load_image()) for row in rotations]
    together = evaluate(pipeline, model[1], lambda _: [batch], ["p2r", "grid"], DECODING, total=4)
    assert shapes == [(2, 384, 384, 3)]
    assert answers(together) == answers(alone)
    assert len({r["perceiver_text"] for r in together if r["mode"] == "p2r"}) > 1


def test_a_batch_over_the_bound_goes_in_parts(pipeline, model, monkeypatch):
    batch = [LoadedRow(SOURCE[i], SOURCE[i].load_image()) for i in range(5)]
    run = lambda pipeline: evaluate(
        pipeline, model[1], lambda _: [batch], ["p2r", "default"], DECODING, total=5
    )
    whole = run(pipeline)
    shapes = uploads(monkeypatch)
    tight = dataclasses.replace(pipeline.builder.buckets, image_bytes=2 * 384**2 * 3)
    builder = copy.copy(pipeline.builder)
    builder.buckets = tight
    parts = run(dataclasses.replace(pipeline, builder=builder))
    assert shapes == [(2, 384, 384, 3)] * 2 + [(1, 384, 384, 3)]
    assert answers(parts) == answers(whole)
