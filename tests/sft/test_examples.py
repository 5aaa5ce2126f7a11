"""What the tiny model is taught: targets, the tokens that links join, and the tower's labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from p2r_jax.data.visual_search import COLOURS, VisualSearch
from p2r_jax.qwen3_vl.positions import patch_coordinates
from p2r_jax.qwen3_vl.processor import Processor
from p2r_jax.roles.boxes import Box, iou, parse_boxes, parse_response
from p2r_jax.roles.image_store import ImageStore
from p2r_jax.roles.prompts import load_prompt_set
from p2r_jax.roles.requests import RequestBuilder
from p2r_jax.sft.dense import WINDOWS_PER_SCENE, render_windows
from p2r_jax.sft.examples import ExampleMaker, box_text, pack, snapped_box
from p2r_jax.sft.tiny import COORDINATE_STEP
from p2r_jax.sft.warm_start import BUCKETS, WarmStartConfig
from tests.tiny import random_model

SCENES = range(6)
QUESTIONS = 3
TAUGHT = set(WarmStartConfig().taught)
SOURCE = VisualSearch("train")
SIZE = SOURCE.config.image_size
GLYPHS = SOURCE.config.glyphs


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture(scope="module")
def processor(tiny_files) -> Processor:
    return Processor.from_pretrained(tiny_files)


@pytest.fixture(scope="module")
def builder(processor) -> RequestBuilder:
    return RequestBuilder(processor, load_prompt_set("tiny"), BUCKETS)


@pytest.fixture(scope="module")
def scenes():
    return [SOURCE.render_scene(i) for i in SCENES]


@pytest.fixture(scope="module")
def images(scenes) -> ImageStore:
    return ImageStore.upload([scene.image for scene in scenes], BUCKETS)


@pytest.fixture(scope="module")
def asked(scenes):
    """(number of the scene, scene, question)."""
    rng = np.random.default_rng(0)
    return [
        (i, scene, question)
        for i, scene in enumerate(scenes)
        for question in SOURCE.questions_for(scene, rng, QUESTIONS)
    ]


@pytest.fixture
def maker(builder) -> ExampleMaker:
    return ExampleMaker(SOURCE, builder, seed=0)


def true_boxes(scene, question) -> list[Box]:
    boxes = (snapped_box(b, np.random.default_rng(0)) for b in tile_boxes(scene, question))
    return [Box(tuple(map(float, box)), "tile") for box in boxes]


def tile_boxes(scene, question):
    return [SOURCE.tile_box(scene.tiles[t]) for t in question.tiles]


def target_tokens(builder, example) -> np.ndarray:
    return example.tokens[len(example.request.tokens) :]


def text_of(builder, token) -> str:
    return builder.processor.tokenizer.decode([int(token)])


# --- targets ----------------------------------------------------------------------------------


def test_a_snapped_box_is_in_whole_steps_and_never_empty():
    rng = np.random.default_rng(0)
    for box in [(0, 0, 1, 1), (999, 999, 1000, 1000), (120, 130, 240, 260), (0, 0, 1000, 1000)]:
        for jitter in (0.0, 0.8, 30.0):
            x1, y1, x2, y2 = snapped_box(box, rng, jitter)
            assert all(v % COORDINATE_STEP == 0 for v in (x1, y1, x2, y2))
            assert 0 <= x1 < x2 <= 1000
            assert 0 <= y1 < y2 <= 1000
    assert snapped_box((120, 130, 240, 260), rng) == [100, 150, 250, 250]


def test_a_target_is_plain_json_that_the_parser_reads():
    text = box_text([[50, 100, 150, 200], [0, 0, 1000, 1000]], ["red tile", "blue tile"])
    assert [entry["label"] for entry in json.loads(text)] == ["red tile", "blue tile"]
    parsed = parse_response(text)
    assert parsed.well_formed
    assert [b.bbox_2d for b in parsed.boxes] == [(50, 100, 150, 200), (0, 0, 1000, 1000)]
    assert box_text([], []) == "[]"


def test_perceiver_targets_are_well_formed_box_lists_of_the_asked_words(
    maker, builder, images, asked
):
    for i, scene, question in asked:
        example = maker.perceiver(images, i, scene, question, TAUGHT)
        parsed = parse_response(example.target)
        assert parsed.well_formed
        assert [b.label for b in parsed.boxes] == [f"{word} tile" for word in question.words]
        *written, last = target_tokens(builder, example)
        assert builder.processor.decode(written) == example.target
        assert last in builder.processor.stop_ids


def test_a_coordinate_is_one_token(maker, builder, images, asked):
    i, scene, question = asked[0]
    example = maker.perceiver(images, i, scene, question, TAUGHT)
    written = [text_of(builder, t) for t in target_tokens(builder, example)]
    numbers = [int(text) for text in written if text.isdigit()]
    corners = [int(c) for box in parse_boxes(example.target) for c in box.bbox_2d]
    assert numbers == corners


def test_taught_words_get_their_true_tile_and_others_any(maker, images, asked):
    right = {True: [], False: []}
    for _ in range(3):
        for i, scene, question in asked:
            example = maker.perceiver(images, i, scene, question, TAUGHT)
            pairs = zip(
                question.words,
                parse_boxes(example.target),
                tile_boxes(scene, question),
                strict=True,
            )
            for word, box, tile in pairs:
                right[word in TAUGHT].append(iou(box.bbox_2d, tile) > 0.2)
    assert all(right[True])
    assert right[True]
    assert 0 <= np.mean(right[False]) < 0.6


def test_a_reasoner_target_reads_the_characters_and_picks_their_option(maker, images, asked):
    for i, scene, question in asked:
        example = maker.reasoner(images, i, scene, question, true_boxes(scene, question), GLYPHS)
        glyphs = [SOURCE.config.glyphs[scene.tiles[t]["glyph"]] for t in question.tiles]
        thought, _, answer = example.target.partition("</think><answer>")
        assert thought == f"<think>{' '.join(glyphs)}"
        assert answer == f"{question.answer}</answer>"
        if question.kind != "same":
            assert question.options["ABCDEF".index(question.answer)] == glyphs[0]
        assert len(example.request.views) == 1 + len(question.tiles)


def test_a_character_that_is_not_taught_is_called_by_some_option_with_its_letter(
    maker, images, asked
):
    wrong = 0
    for i, scene, question in asked:
        if question.kind == "same":
            continue
        example = maker.reasoner(images, i, scene, question, true_boxes(scene, question), "")
        thought, _, answer = example.target.partition("</think><answer>")
        letter = answer.removesuffix("</answer>")
        assert question.options["ABCDEF".index(letter)] == thought.removeprefix("<think>")
        wrong += letter != question.answer
    assert wrong >= len(asked) // 3


def test_direct_and_whole_image_targets_have_the_form_of_their_role(maker, images, asked):
    i, scene, question = asked[0]
    assert maker.direct(images, i, scene, question).target == question.answer
    whole = maker.whole(images, i, scene, question)
    assert not whole.request.has_evidence
    assert whole.target.startswith("<think>")
    assert whole.target.endswith("</answer>")


# --- links ------------------------------------------------------------------------------------


def pixel_window(builder, request, position: int) -> tuple[int, tuple[float, ...]]:
    """Which view the visual token at `position` belongs to, and the source pixels it covers."""
    config, sizes = builder.processor.config, builder.processor.sizes
    assert request.tokens[position] == config.image_token_id
    before = request.tokens[: position + 1]
    view_index = int((before == config.vision_start_token_id).sum()) - 1
    start = int(np.flatnonzero(before == config.vision_start_token_id)[-1]) + 1
    view = request.views[view_index]
    columns = view.target[1] // (sizes.patch * sizes.merge)
    rows = view.target[0] // (sizes.patch * sizes.merge)
    row, column = divmod(position - start, columns)
    left, top, right, bottom = view.crop
    width, height = (right - left) / columns, (bottom - top) / rows
    x, y = left + column * width, top + row * height
    return view_index, (x, y, x + width, y + height)


def assert_covers(window, tile) -> None:
    left, top, right, bottom = tile["box"]
    x, y = (left + right) / 2, (top + bottom) / 2
    assert window[0] - 1e-6 <= x <= window[2] + 1e-6
    assert window[1] - 1e-6 <= y <= window[3] + 1e-6


def test_perceiver_links_join_word_to_tile_and_coordinate_to_word(maker, builder, images, asked):
    for i, scene, question in asked:
        example = maker.perceiver(images, i, scene, question, TAUGHT)
        prompt = len(example.request.tokens)
        first = [link for link in example.links if link.layer == 0]
        second = [link for link in example.links if link.layer == 1]
        assert len(first) == len(question.words)
        for link, word, tile in zip(first, question.words, question.tiles, strict=True):
            assert text_of(builder, example.tokens[link.query]) == f" {word}"
            view, window = pixel_window(builder, example.request, link.key)
            assert view == 0
            assert_covers(window, scene.tiles[tile])
        assert len(second) == 4 * len(question.words)
        for n, link in enumerate(second):
            # The position that *predicts* the coordinate, hence one earlier.
            assert text_of(builder, example.tokens[link.query + 1]).isdigit()
            assert link.query + 1 >= prompt
            assert text_of(builder, example.tokens[link.key]) == f" {question.words[n // 4]}"


def test_reasoner_links_join_word_to_crop_and_answer_to_option(maker, builder, images, asked):
    found = 0
    for i, scene, question in asked:
        example = maker.reasoner(images, i, scene, question, true_boxes(scene, question), GLYPHS)
        tokens, prompt = example.tokens, len(example.request.tokens)
        tiles = dict(zip(question.words, question.tiles, strict=True))
        for link in example.links:
            assert 0 <= link.key < len(tokens)
            assert link.key < link.query or tokens[link.key] == tokens[link.query]
            query, key = text_of(builder, tokens[link.query]), tokens[link.key]
            if key == builder.processor.config.image_token_id:
                assert link.layer == 0
                view, window = pixel_window(builder, example.request, link.key)
                assert view >= 1
                assert_covers(window, scene.tiles[tiles[query.strip()]])
                found += 1
        if question.kind == "same":
            continue
        glyph = SOURCE.config.glyphs[scene.tiles[question.tiles[0]]["glyph"]]
        answer = prompt + 2
        assert text_of(builder, tokens[answer]) == "</think><answer>"
        assert text_of(builder, tokens[answer - 1]) == glyph
        (looked_up,) = (x.key for x in example.links if (x.layer, x.query) == (1, answer))
        assert text_of(builder, tokens[looked_up]) == glyph
        assert looked_up < prompt
        # The option's text follows its letter, which is the answer.
        assert question.answer in text_of(builder, tokens[looked_up - 1])
    assert found >= len(asked)


# --- packing ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(builder, images, asked):
    maker = ExampleMaker(SOURCE, builder, seed=0)
    examples = [(maker.perceiver(images, *one, TAUGHT), images) for one in asked]
    model = random_model(builder.processor.config)
    return examples, model, pack(examples, model, builder, 20, len(examples))


def test_only_the_target_is_trained_and_its_first_token_from_the_last_of_the_prompt(packed):
    examples, _, pool = packed
    for n, (example, _) in enumerate(examples):
        trained = np.flatnonzero(pool.is_target[n])
        prompt, end = len(example.request.tokens), len(example.tokens)
        assert trained.tolist() == list(range(prompt - 1, end - 1))
        np.testing.assert_array_equal(pool.tokens[n, :end], example.tokens)
        assert pool.valid[n].sum() == end


def test_links_are_kept_and_padded(packed):
    examples, _, pool = packed
    for n, (example, _) in enumerate(examples):
        kept = [tuple(link) for link in pool.links[n] if link[0] >= 0]
        assert kept == [(x.layer, x.query, x.key) for x in example.links]


def test_each_example_has_the_visual_tokens_of_its_own_image(packed, builder):
    examples, model, pool = packed
    for n in (0, QUESTIONS, 2 * QUESTIONS + 1):
        example, images = examples[n]
        prompts = builder.collate([example.request], images)
        visual, deepstack = model.visual(prompts.patches)
        count = int((pool.visual_slot[n] >= 0).sum())
        np.testing.assert_allclose(pool.visual[n, :count], visual[0, :count], atol=2e-5)
        np.testing.assert_allclose(pool.deepstack[:, n, :count], deepstack[:, 0, :count], atol=2e-5)


def test_taking_examples_keeps_every_field_together(packed):
    _, _, pool = packed
    taken = pool.take(np.array([4, 1, 4]))
    np.testing.assert_array_equal(taken["tokens"][1], pool.tokens[1])
    np.testing.assert_array_equal(taken["positions"][:, 0], pool.positions[:, 4])
    np.testing.assert_array_equal(taken["deepstack"][:, 2], pool.deepstack[:, 4])
    assert taken["links"].shape[0] == 3


# --- labels of the tower ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense_pool(processor):
    return render_windows(SOURCE, 0, 24, processor.sizes, np.random.default_rng(0))


def token_pixels(pool, i: int, token: int, patch: int) -> np.ndarray:
    """[4 p p, 3] pixels of one visual token."""
    own = pool.pixels[i, 4 * token : 4 * token + 4].reshape(4, 3, patch, patch)
    return own.transpose(0, 2, 3, 1).reshape(-1, 3).astype(int)


def test_overviews_label_every_tile_and_no_character(dense_pool):
    for i in range(0, 24, WINDOWS_PER_SCENE):
        tiles = SOURCE.layout(i // WINDOWS_PER_SCENE)
        columns = dense_pool.grids[i][1] // 2
        rows = dense_pool.grids[i][0] // 2
        expected = {}
        for tile in tiles:
            x, y = (tile["box"][:2] + tile["box"][2:]) / 2 / SIZE
            expected[int(y * rows) * columns + int(x * columns)] = (tile, (x, y))
        labelled = np.flatnonzero(dense_pool.labels["colour"][i] >= 0)
        assert sorted(expected) == labelled.tolist()
        assert (dense_pool.labels["glyph"][i] == -1).all()
        for token, (tile, centre) in expected.items():
            assert dense_pool.labels["colour"][i, token] == tile["colour"]
            assert dense_pool.labels["shape"][i, token] == tile["shape"]
            np.testing.assert_allclose(dense_pool.position[i, token], centre, atol=1e-6)
            corners = dense_pool.labels["corners"][i, token] * COORDINATE_STEP
            assert np.abs(corners - tile["box"] * 1000 / SIZE).max() <= COORDINATE_STEP / 2
        assert (
            dense_pool.labels["corners"][i, ~np.isin(range(dense_pool.position.shape[1]), labelled)]
            == -1
        ).all()


def test_a_labelled_token_shows_its_colour(dense_pool, processor):
    """Found in the pixels, not by the formula that wrote the label."""
    palette = np.array([COLOURS[name] for name in SOURCE.config.colours])
    for i in range(24):
        colours = dense_pool.labels["colour"][i]
        for token in np.flatnonzero(colours >= 0):
            pixels = token_pixels(dense_pool, i, token, processor.sizes.patch)
            distance = np.abs(pixels[:, None] - palette).max(-1)
            assert distance.min(0)[colours[token]] <= 40


def test_crops_also_label_characters(dense_pool):
    crops = [i for i in range(24) if i % WINDOWS_PER_SCENE]
    assert all((dense_pool.labels["glyph"][i] >= 0).any() for i in crops)
    assert (dense_pool.labels["corners"][crops] == -1).all()
    for i in range(1, 24, 2):
        seen = dense_pool.labels["glyph"][i] >= 0
        np.testing.assert_array_equal(seen, dense_pool.labels["colour"][i] >= 0)


def test_patches_are_in_merge_block_order(dense_pool, processor):
    """Neighbouring patches meet without a seam once they are put where `row_col` says."""
    from PIL import Image

    i, patch = 0, processor.sizes.patch
    grid = dense_pool.grids[i]
    where = patch_coordinates(grid, processor.sizes.merge)
    canvas = np.zeros((grid[0], grid[1], 3, patch, patch), np.uint8)
    own = dense_pool.pixels[i, : len(where)].reshape(-1, 3, patch, patch)
    canvas[where[:, 0], where[:, 1]] = own
    picture = canvas.transpose(0, 3, 1, 4, 2).reshape(grid[0] * patch, grid[1] * patch, 3)
    scene = Image.fromarray(SOURCE.render_scene(0).image)
    expected = np.asarray(scene.resize(picture.shape[1::-1], Image.Resampling.BICUBIC))
    different = (np.abs(picture.astype(int) - expected) > 1).any(-1).mean()
    assert different < 0.25  # an outline may have been drawn
