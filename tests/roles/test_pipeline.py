"""Both roles end to end on a model that babbles: whatever it writes is data, never an exception."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from p2r_jax.data.visual_search import VisualSearch
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.qwen3_vl.hf import load_pretrained
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.pipeline import Completion, Pipeline, default_buckets, perceive_and_reason
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import Buckets, Request
from p2r_jax.rollout.generate import Schedule
from p2r_jax.rollout.sampling import Sampling

GOLDEN = Path(__file__).parents[1] / "golden"
QUESTION = "Which character is on the red tile?"
BOX_LIST = '[{"bbox_2d":[100,200,300,400],"label":"red tile"}]'


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_pretrained(tiny_checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def image():
    return VisualSearch().render_scene(0).image


@pytest.fixture(scope="module")
def pipeline(model, processor):
    buckets = Buckets(patches=(80, 320), prompt_tokens=(64, 160), canvas=(96,), image=(384,))
    graph = nnx.split(model)[0]
    return Pipeline.create(graph, processor, load_prompt_set("tiny"), buckets, schedule=Schedule(2))


def ask(model, image, question=QUESTION, **options):
    options = {"perceiver_max_new_tokens": 12, "reasoner_max_new_tokens": 12} | options
    return perceive_and_reason(model, image, question, prompts="tiny", **options)


def scripted(monkeypatch, perceiver: str, reasoner: str) -> list[Request]:
    """Let the model write these texts; returns the requests it will get."""
    seen: list[Request] = []

    def complete(self, params, requests, images, sampling, seeds=None):
        seen.extend(requests)
        return [Completion(perceiver if len(seen) == 1 else reasoner, ()) for _ in requests]

    monkeypatch.setattr(Pipeline, "complete", complete)
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_it_never_raises_whatever_the_model_babbles(model, processor, image, seed):
    graph, params = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    noisy = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)
    result = ask(nnx.merge(graph, noisy), image, options=["H", "2"], processor=processor)
    assert isinstance(result.answer, str)
    assert len(result.evidence.views) == (1 + min(len(result.boxes), 3) if result.boxes else 1)


def test_the_result_holds_what_was_seen_and_written(monkeypatch, model, image):
    written = "<think> it reads 2 </think><answer> B </answer>"
    requests = scripted(monkeypatch, BOX_LIST, written)
    result = ask(model, image, options=["H", "2"])
    assert [box.bbox_2d for box in result.boxes] == [(100, 200, 300, 400)]
    assert result.boxes[0].label == "red tile"
    assert (result.perceiver_text, result.reasoner_text) == (BOX_LIST, written)
    assert (result.reasoning, result.answer) == ("it reads 2", "B")
    assert result.evidence.found
    assert result.evidence.views == requests[1].views


def test_both_roles_are_asked_the_question_with_its_options(monkeypatch, model, processor, image):
    requests = scripted(monkeypatch, BOX_LIST, "")
    ask(model, image, options=["H", "2"])
    texts = [processor.tokenizer.decode(r.tokens) for r in requests]
    assert f"Find: {QUESTION}\nA. H\nB. 2" in texts[0]
    assert f"Zoomed: {QUESTION}\nA. H\nB. 2" in texts[1]
    assert [len(r.views) for r in requests] == [1, 2]


def test_an_answer_without_tag_is_the_whole_text(monkeypatch, model, image):
    scripted(monkeypatch, "[]", " just 2 ")
    result = ask(model, image)
    assert (result.answer, result.reasoning) == ("just 2", "just 2")
    assert not result.evidence.found


MALFORMED = [
    "",
    "I cannot see it",
    "```json\n[]\n```",
    '{"bbox_2d": null}',
    '[{"bbox_2d": [NaN, 0, 1, Infinity]}]',
    '[{"bbox_2d": [true, false, true, true]}]',
    '[{"bbox_2d": [500, 500, 400, 400]}]',
    '[{"bbox_2d": [2000, 2000, 3000, 3000], "label": 3}]',
    "[" * 5000,
    "7",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_output_behaves_like_an_empty_list(monkeypatch, model, image, text):
    asked = []
    for perceived in ("[]", text):
        asked.append(scripted(monkeypatch, perceived, "<answer>A</answer>"))
        assert ask(model, image).boxes == []
    expected, actual = (requests[1] for requests in asked)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert actual.views == expected.views
    assert not actual.has_evidence


def test_every_golden_perceiver_text_gives_a_reasoner_request(monkeypatch, model, image):
    for case in json.loads((GOLDEN / "parse_boxes.json").read_text())[::8]:
        requests = scripted(monkeypatch, case["text"], "")
        result = ask(model, image)
        assert requests[1].has_evidence == result.evidence.found == bool(result.boxes)


def test_pillow_images_of_any_mode_are_taken(monkeypatch, model, image):
    grey = Image.fromarray(image).convert("L")
    scripted(monkeypatch, "[]", "")
    assert ask(model, grey).evidence.views[0].crop == (0, 0, 384, 384)


def test_a_model_without_folder_needs_a_processor(model, image):
    graph, params = nnx.split(model)
    nameless = nnx.merge(graph, params)
    nameless.name_or_path = ""
    with pytest.raises(ValueError, match="not loaded from a folder: pass processor="):
        ask(nameless, image)


def test_an_image_that_is_too_long_is_an_error(model):
    with pytest.raises(ValueError, match="aspect ratio above 200"):
        ask(model, np.zeros((2, 401, 3), np.uint8))


def test_default_buckets_hold_four_images_of_the_budget(processor):
    sizes = processor.sizes
    buckets = default_buckets(sizes, 384)
    for height, width in [(384, 384), (384, 32), (20, 384), (384, 100)]:
        target = sizes.target_size(height, width)
        rows, columns = sizes.grid(target)
        assert 4 * rows * columns <= buckets.patches[-1]
        assert max(target) <= buckets.canvas[-1]
    assert 4 * sizes.max_patches // 4 <= buckets.prompt_tokens[-1]
    assert buckets.image == (64, 128, 256, 512)
    # A small image does not pay for a large budget: steps of at most a doubling from small on.
    for sizes in dataclasses.astuple(buckets)[:4]:
        assert sizes[0] == 64
        assert all(small < large <= 2 * small for small, large in itertools.pairwise(sizes))


# --- sample -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(pipeline, image):
    """Three requests about two pictures."""
    images = two_pictures(pipeline, image)
    questions = [(0, "red?"), (1, "which of the blue tiles is it?"), (1, "red?")]
    return images, [pipeline.builder.plain("perceiver", images, *q, "mca") for q in questions]


@pytest.mark.parametrize(
    "schedule",
    [Schedule(slots=8), Schedule(slots=2), Schedule(slots=1, columns=1), Schedule(refill=2)],
)
def test_a_schedule_changes_neither_prompts_nor_completions(model, pipeline, asked, schedule):
    """More slots than prompts, fewer, and prompts that come in two batches."""
    params, (images, requests) = nnx.split(model)[1], asked
    sampling, seeds = Sampling(6, group=2), [5, 6, 7]
    once = pipeline.sample(params, requests, images, sampling, seeds)
    other = pipeline.sample(params, requests, images, sampling, seeds, schedule)
    assert other.outputs == once.outputs
    assert len({output.tokens for group in once.outputs for output in group}) > 3
    np.testing.assert_array_equal(other.prompts.tokens, once.prompts.tokens)


def test_prompts_and_completions_of_a_mesh_have_filling_rows_and_none(
    tiny_checkpoint, pipeline, asked
):
    """Three requests on two devices: the update gets four rows of prompts."""
    mesh = make_mesh(2, 1, 1, jax.devices()[:2])
    graph, params = nnx.split(load_pretrained(tiny_checkpoint, mesh, "float32"))
    builder = pipeline.builder
    here = Pipeline.create(
        graph, builder.processor, builder.prompts, builder.buckets, mesh, Schedule(2)
    )
    images, requests = asked
    pixels = [np.asarray(images.pixels[i, :h, :w]) for i, (h, w) in enumerate(images.shapes)]
    images = ImageStore.upload(pixels, builder.buckets, mesh)
    sampling = Sampling(6, group=2)
    out = here.sample(params, requests, images, sampling, [5, 6, 7])
    queued = here.sample(params, requests, images, sampling, [5, 6, 7], Schedule(slots=2))
    assert out.prompts.tokens.shape[0] == 4
    assert out.completions.tokens.shape[:2] == (3, 2)
    assert queued.outputs == out.outputs


# --- complete ---------------------------------------------------------------------------------


def two_pictures(pipeline, image):
    return ImageStore.upload([image, image[::-1, :200].copy()], pipeline.builder.buckets)


def test_equal_requests_are_answered_once_and_order_is_kept(monkeypatch, model, pipeline, image):
    params = nnx.split(model)[1]
    images = two_pictures(pipeline, image)
    plain = [
        pipeline.builder.plain("perceiver", images, i, question, "mca")
        for i in (0, 1)
        for question in ("red?", "which of the blue tiles is it?")
    ]
    answered = []
    run = Pipeline._generate

    def counted(self, params, requests, *rest):
        answered.append(len(requests))
        return run(self, params, requests, *rest)

    monkeypatch.setattr(Pipeline, "_generate", counted)
    order, sampling = [3, 0, 1, 0, 2, 3, 3, 1], Sampling(6)
    together = pipeline.complete(params, [plain[i] for i in order], images, sampling)
    assert sum(answered) == 4
    alone = [pipeline.complete(params, [request], images, sampling)[0] for request in plain]
    assert together == [alone[i] for i in order]


def test_no_requests_need_no_model(pipeline, image):
    assert pipeline.complete(None, [], two_pictures(pipeline, image), Sampling(6)) == []


@pytest.mark.parametrize(
    "image, found",
    [
        (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8, 3)), r"float64 \[8, 8, 3\]"),
    ],
)
def test_an_array_that_is_no_image_is_refused(model, image, found):
    with pytest.raises(ValueError, match=rf"must be uint8 \[height, width, 3\], is {found}"):
        perceive_and_reason(model, image, "Which?")
