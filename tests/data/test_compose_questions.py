"""Questions give nothing away, and pixels are what the checks say."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from p2r_jax.data.compose_baselines import correlation
from p2r_jax.data.compose_pixels import (
    TINTS,
    Sprite,
    lab,
    luminance,
    nearest_tint,
    object_sprite,
    paste,
    tag_pixels,
    tinted,
    with_tag,
)
from p2r_jax.data.compose_questions import (
    KINDS,
    NUMBERS,
    WORDS,
    blind_baselines,
    full_text,
    plan_questions,
    shuffled,
    text_options,
)
from p2r_jax.data.compose_scene import SIZES, _related, overview_scale
from tests.data.compose_material import cutout


@given(st.integers(10, 300), st.integers(0, 9))
@settings(deadline=None)
def test_letters_and_answers_are_balanced_within_every_kind(count, seed):
    plans = plan_questions("test", count, np.random.default_rng(seed))
    assert [plan.number for plan in plans] == list(range(count))
    for kind, (_, options, share) in KINDS.items():
        here = [plan for plan in plans if plan.kind == kind]
        assert abs(len(here) - share * count) < 1
        letters = Counter(plan.label for plan in here)
        assert set(letters) <= set("ABCD"[:options])
        if len(here) >= options:
            assert max(letters.values()) - min(letters.values()) <= 1
            assert len(letters) == options
        answers = Counter(plan.answer for plan in here)
        assert max(answers.values()) - min(answers.values()) <= 1 or len(here) < len(answers)


def test_letters_tell_nothing_about_answers():
    plans = plan_questions("test", 1000, np.random.default_rng(0))
    for kind, pairs in (("colour", 20), ("horizontal", 4), ("vertical", 4)):
        seen = Counter((plan.label, plan.answer) for plan in plans if plan.kind == kind)
        assert len(seen) == pairs
        assert max(seen.values()) - min(seen.values()) <= 1


@given(st.permutations(["right", "x", "y", "z"]), st.sampled_from("ABCD"), st.integers(0, 99))
def test_the_right_option_is_shown_at_its_letter(options, label, seed):
    shown = shuffled(options, label, np.random.default_rng(seed))
    assert sorted(shown) == sorted(options)
    assert shown["ABCD".index(label)] == options[0]
    assert f"({label}) {options[0]}\n" in full_text("What?", shown)


@pytest.mark.parametrize("kind", ["word", "number"])
def test_the_right_text_is_not_the_one_that_resembles_the_others(kind):
    rng = np.random.default_rng(0)
    rows, overview = [], []
    for _ in range(300):
        options, least = text_options(kind, 8, 0.5, rng)
        assert len(set(options)) == 4
        assert set(options) <= set(WORDS if kind == "word" else NUMBERS)
        assert len({len(option) for option in options}) == 1
        assert least["native"] >= 15
        overview.append(least["overview"])
        label = "ABCD"[int(rng.integers(4))]
        shown = shuffled(options, label, rng)
        rows.append({"kind": kind, "label": label, "shown": shown})
    assert np.median(overview) < {"word": 16, "number": 9}[kind]  # grey levels
    right = blind_baselines(rows, [])["most in common"]
    assert 0.16 < np.mean(right) < 0.34  # chance, give or take 3.6 standard deviations


def test_wrong_texts_look_more_alike_in_the_overview_than_any_texts_do():
    options, _ = text_options("number", 8, 0.5, np.random.default_rng(1))
    others = NUMBERS[:: len(NUMBERS) // 4]

    def spread(texts):
        small = [
            np.asarray(
                Image.fromarray(luminance(tag_pixels(t, 8)).astype(np.uint8)).resize((12, 8)),
                np.float32,
            )
            for t in texts
        ]
        return np.mean([np.abs(a - b).mean() for a in small for b in small])

    assert spread(options) < 0.7 * spread(others)


def row(kind, label, *shown):
    return {"kind": kind, "label": label, "shown": list(shown)}


def test_blind_baselines_by_hand():
    rows = [
        row("colour", "A", "red", "blue", "green", "yellow"),
        row("colour", "B", "red", "blue", "green", "yellow"),
        row("colour", "B", "blue", "red", "green", "yellow"),
        row("horizontal", "A", "The a is on the left side of the b.", "... right side of the b."),
        row("number", "A", "111", "112", "211", "999"),
    ]
    elsewhere = [
        row("colour", "A", "red", "blue", "green", "yellow"),
        row("horizontal", "B", "The x is on the left side of y.", "The x is on the right side."),
    ]
    right = blind_baselines(rows, elsewhere)
    assert right["letter"] == [True, False, False, True, True]
    assert right["letter by template"] == [False, True, True, True, True]
    assert right["option by template"] == [True, False, True, False, True]
    assert right["most in common"][4]


def test_relations_are_clear():
    a, b = (100, 500, 120, 520), (700, 500, 720, 520)
    assert _related("horizontal", "left", a, b, 1000, 1000)
    assert not _related("horizontal", "right", a, b, 1000, 1000)
    assert _related("horizontal", "right", b, a, 1000, 1000)
    assert not _related("vertical", "above", a, b, 1000, 1000)
    assert not _related("horizontal", "left", a, (150, 500, 170, 520), 1000, 1000)
    assert _related("vertical", "above", (500, 100, 520, 120), (500, 700, 520, 720), 1000, 1000)


@pytest.mark.parametrize(
    "size, low, high", [("2k", 0.35, 0.42), ("4k", 0.4, 0.5), ("8k", 0.2, 0.25)]
)
def test_overviews_are_much_smaller_than_images(size, low, high):
    width, budget = SIZES[size].width, SIZES[size].budget
    for aspect in (4 / 3, 16 / 9):
        assert low <= overview_scale((width, round(width / aspect)), budget) <= high


def test_lab_of_known_colours():
    known = {(255, 0, 0): (53.24, 80.09, 67.20), (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0)}
    for rgb, expected in known.items():
        np.testing.assert_allclose(lab(np.array(rgb)), expected, atol=0.03)


def test_every_tint_is_named_by_its_own_name():
    for seed in range(6):
        for tint in TINTS:
            pixels = np.asarray(tinted(cutout(seed), tint), np.float32)
            mean = pixels[pixels[..., 3] > 200][:, :3].mean(axis=0)
            name, margin = nearest_tint(mean)
            assert (name, margin > 15) == (tint, True)


@given(st.integers(0, 20), st.integers(10, 60), st.floats(-15, 15), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_sprite_fills_its_box_exactly(seed, side, angle, flip):
    sprite = object_sprite(cutout(seed), side, angle, flip)
    assert max(sprite.size) == side
    solid = sprite.pixels[..., 3] > 0.25
    assert solid.any(axis=0)[[0, -1]].all()
    assert solid.any(axis=1)[[0, -1]].all()


@pytest.mark.parametrize("height", [6, 8, 9, 12, 16])
def test_tags_show_capitals_of_the_height_asked_for(height):
    for text in ("HELL", "480"):
        plate = luminance(tag_pixels(text, height))[1:-1, 1:-1]
        rows = np.flatnonzero((plate < 150).any(axis=1))
        assert height - 1 <= rows[-1] - rows[0] + 1 <= height + (text == "480")
        columns = np.flatnonzero((plate < 150).any(axis=0))
        assert min(columns[0], plate.shape[1] - 1 - columns[-1]) >= 1  # nothing is cut off
    assert tag_pixels("111", height).shape == tag_pixels("480", height).shape


def test_pasting_changes_the_box_and_a_shadow_only():
    scene = np.full((200, 220, 3), 150, np.uint8)
    sprite = with_tag(object_sprite(cutout(1), 30, 5.0, False), "HOLE", 8)
    paste(scene, sprite, 90, 80, np.random.default_rng(0), soften=0.4)
    changed = np.abs(scene.astype(int) - 150).max(axis=-1) > 60
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    width, height = sprite.size
    assert (rows[0], rows[-1] + 1) == (80, 80 + height)
    assert (columns[0], columns[-1] + 1) == (90, 90 + width)
    far = np.ones(changed.shape, bool)
    far[60 : 100 + height, 70 : 110 + width] = False
    assert (scene[far] == 150).all()


def test_what_is_pasted_takes_the_grain_of_the_ground():
    def rough(noise):
        rng = np.random.default_rng(0)
        ground = 150 + rng.normal(0, noise, (120, 120, 1)) * np.ones(3)
        scene = ground.clip(0, 255).astype(np.uint8)
        flat = np.dstack([np.full((40, 40, 3), 90.0), np.ones((40, 40))]).astype(np.float32)
        paste(scene, Sprite(flat, (0, 0, 40, 40)), 40, 40, rng)
        return scene[45:75, 45:75].std()

    assert rough(0) < 1 < 2 < rough(4) < 6


def test_correlation_is_the_masked_one_and_finds_what_was_planted():
    rng = np.random.default_rng(0)
    view = rng.normal(120, 30, (40, 50)).astype(np.float32)
    template = rng.normal(120, 40, (7, 5)).astype(np.float32)
    mask = (rng.random((7, 5)) > 0.3).astype(np.float32)
    view[20:27, 30:35] = np.where(mask > 0, 0.5 * template + 20, view[20:27, 30:35])
    fit = correlation(view, template, mask)
    assert np.unravel_index(fit.argmax(), fit.shape) == (20, 30)
    for y, x in ((0, 0), (3, 9), (33, 45), (20, 30)):
        part, weight = view[y : y + 7, x : x + 5], mask / mask.sum()
        a, b = template - (template * weight).sum(), part - (part * weight).sum()
        spread = np.sqrt((a * a * weight).sum() * ((b * b * weight).sum() + 16))
        assert fit[y, x] == pytest.approx((a * b * weight).sum() / spread, abs=1e-4)
