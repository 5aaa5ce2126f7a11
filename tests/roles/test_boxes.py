"""What counts as a box in a perceiver's answer, and which pixels a box means."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from p2r_jax.ops.outlines import OUTLINE_COLORS
from p2r_jax.roles import boxes
from p2r_jax.roles.boxes import Box, crop_rectangle, iou, outline_rectangle, parse_boxes

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def answer(*bboxes, label="cup"):
    return json.dumps([{"bbox_2d": bbox, "label": label} for bbox in bboxes])


# --- parse_boxes ------------------------------------------------------------------------------


def under_our_rules(raw):
    """A golden box as we read it, and which of our three rules changed what the authors had."""
    coordinates = tuple(float(min(max(c, 0), 1000)) for c in raw["bbox_2d"])
    label = raw["label"] if isinstance(raw["label"], str) else ""
    changes = []
    if list(coordinates) != raw["bbox_2d"]:
        changes.append("clamped to 0-1000")
    if label != raw["label"]:
        changes.append("label that is not text read as missing")
    x1, y1, x2, y2 = coordinates
    short, long = sorted([x2 - x1, y2 - y1])
    if long > 200 * short:
        return None, [*changes, "dropped: empty, or an aspect ratio above 200"]
    return Box(coordinates, label), changes


def test_boxes_equal_the_authors_up_to_the_rules_we_add():
    counts = Counter()
    for case in golden("parse_boxes"):
        read = [under_our_rules(raw) for raw in case["boxes"]]
        assert parse_boxes(case["text"]) == [box for box, _ in read if box], case["text"]
        counts["texts"] += 1
        counts["texts read differently"] += any(changes for _, changes in read)
        counts.update(change for _, changes in read for change in changes)
    assert counts == {
        "texts": 170,
        "texts read differently": 9,
        "clamped to 0-1000": 4,
        "label that is not text read as missing": 2,
        "dropped: empty, or an aspect ratio above 200": 3,
    }


@pytest.mark.parametrize(
    "text",
    [
        answer([1, 2, 3]),
        answer(None),
        answer(5),
        answer("1234"),
        answer({"x1": 1, "y1": 2, "x2": 3, "y2": 4}),
        answer([1, 2, None, 4]),
        answer(["1", "2", "3", "4"]),
        answer([False, False, True, True]),
        answer([[1], 2, 3, 4]),
        '[{"bbox_2d": [NaN, 2, 3, 4], "label": "cup"}]',
        '[{"bbox_2d": [1, 2, Infinity, 4], "label": "cup"}]',
        '[{"bbox_2d": [1, 2, 1e999, 4], "label": "cup"}]',
        '[{"bbox": [1, 2, 3, 4], "label": "cup"}]',
    ],
)
@pytest.mark.parametrize("frame", ["{}", "```json\n{}\n```", "Here: {}"])
def test_a_box_is_four_finite_numbers(text, frame):
    assert parse_boxes(frame.replace("{}", text)) == []


@pytest.mark.parametrize("bbox", [[30, 20, 10, 40], [10, 20, 10, 40], [10, 40, 30, 20]])
def test_corners_in_the_wrong_order_are_no_box(bbox):
    assert parse_boxes(answer(bbox)) == []


def test_coordinates_are_clamped_to_the_image():
    assert parse_boxes(answer([-50, 900, 100.5, 1300])) == [Box((0.0, 900.0, 100.5, 1000.0), "cup")]


@pytest.mark.parametrize("bbox", [[1001, 0, 1200, 50], [-9, 0, 0, 50], [0, 10**400, 5, 10**401]])
def test_a_box_outside_the_image_is_dropped(bbox):
    assert parse_boxes(answer(bbox)) == []


def test_a_box_may_be_200_times_as_long_as_wide_but_no_longer():
    assert len(parse_boxes(answer([0, 0, 1000, 5]))) == 1
    assert parse_boxes(answer([0, 0, 1000, 4.9])) == []
    assert parse_boxes(answer([0, 0, 4.9, 1000])) == []


@pytest.mark.parametrize("label", [None, 7, True, ["cup"], {"name": "cup"}])
def test_a_label_that_is_not_text_counts_as_missing(label):
    assert parse_boxes(answer([1, 2, 3, 4], label=label)) == [Box((1.0, 2.0, 3.0, 4.0), "")]


def test_invalid_entries_do_not_cost_the_valid_ones():
    text = answer([9, 9, 1, 1], [1, 2, 3, 4], None, [5, 6, 7, 8])
    assert [box.bbox_2d for box in parse_boxes(text)] == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_boxes_are_found_in_prose_and_in_truncated_json():
    assert len(parse_boxes(f"I looked closely. {answer([1, 2, 3, 4])} Done.")) == 1
    assert len(parse_boxes(answer([1, 2, 3, 4], [5, 6, 7, 8])[:-12])) == 1


HUGE = "9" * 5000  # more digits than Python converts to an integer


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"bbox_2d":[' * 50_000,
        '{"bbox_2d": ' + "[" * 100_000 + "]" * 100_000 + "}",
        f'[{{"bbox_2d": [1, 2, {HUGE}, 4]}}]',
        f'```json\n[{{"bbox_2d": [1, 2, {HUGE}, 4]}}]\n```',
        "```" * 50_000,
        "\ud800",
        "\x00",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_hostile_text_is_read_quickly_as_no_box(text):
    start = time.monotonic()
    assert parse_boxes(text) == []
    assert time.monotonic() - start < 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["bbox_2d", "label", "x"]), inner, max_size=3)
    ),
    max_leaves=20,
)
plausible = st.lists(
    st.fixed_dictionaries(
        {"bbox_2d": st.lists(st.integers(-100, 1100) | st.floats(), min_size=4, max_size=4)},
        optional={"label": json_values},
    )
)


@given(st.text() | json_values.map(json.dumps) | plausible.map(json.dumps), st.integers(0, 200))
def test_whatever_the_text_the_boxes_are_valid(text, cut):
    for candidate in (text, f"```json\n{text}\n```", text[:cut]):
        for box in parse_boxes(candidate):
            x1, y1, x2, y2 = box.bbox_2d
            assert 0 <= x1 < x2 <= 1000
            assert 0 <= y1 < y2 <= 1000
            assert max(x2 - x1, y2 - y1) <= 200 * min(x2 - x1, y2 - y1)
            assert all(isinstance(c, float) for c in box.bbox_2d)
            assert isinstance(box.label, str)


# --- parse_response ---------------------------------------------------------------------------

ONE = answer([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("text", "num_boxes", "well_formed"),
    [
        (ONE, 1, True),
        (ONE[1:-1], 1, True),
        ("[]", 0, True),
        (f"```json\n{ONE}\n```", 1, True),
        ("```\n[]\n```", 0, True),
        (f"  \n{ONE}\n", 1, True),
        (f"Here: {ONE}", 1, False),
        (ONE[:-1], 1, False),
        (answer([1, 2, 3, 4], [9, 9, 1, 1]), 1, False),
        (answer([9, 9, 1, 1]), 0, False),
        (f"[{ONE}]", 0, False),
        ("", 0, False),
        ("null", 0, False),
        ("the whole image", 0, False),
    ],
)
def test_well_formed_means_json_in_which_every_entry_is_a_box(text, num_boxes, well_formed):
    parsed = boxes.parse_response(text)
    assert (len(parsed.boxes), parsed.well_formed) == (num_boxes, well_formed)


# --- rectangles -------------------------------------------------------------------------------


def test_rectangles_and_line_widths_equal_the_authors():
    for case in golden("crop"):
        size = case["width"], case["height"]
        assert list(crop_rectangle(*size, case["bbox_2d"])) == case["crop"]
        assert list(outline_rectangle(*size, case["bbox_2d"])) == list(
            itertools.chain(*case["outline"])
        )
        assert boxes.line_width(case["width"]) == case["line_width"]


def test_outlines_cycle_through_the_authors_colours():
    for case in golden("crop"):
        ours = itertools.islice(itertools.cycle(OUTLINE_COLORS), len(case["colors"]))
        assert list(ours) == [ImageColor.getrgb(name) for name in case["colors"]]


sizes = st.integers(1, 10_000)
edges = st.lists(st.floats(0, 1000), min_size=2, max_size=2).map(sorted)
valid_boxes = (
    st.builds(lambda x, y: parse_boxes(answer([x[0], y[0], x[1], y[1]])), edges, edges)
    .filter(bool)
    .map(lambda found: found[0])
)


@given(sizes, sizes, valid_boxes)
def test_a_crop_lies_inside_the_image_and_is_never_empty(width, height, box):
    left, top, right, bottom = crop_rectangle(width, height, box.bbox_2d)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(sizes, sizes, valid_boxes)
def test_a_crop_without_padding_is_never_empty_either(width, height, box):
    left, top, right, bottom = crop_rectangle(width, height, box.bbox_2d, padding=0.0)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_padding_is_a_fraction_of_the_image_up_to_a_number_of_pixels():
    middle = (400, 400, 600, 600)
    assert crop_rectangle(1000, 100, middle, padding=0.2) == (200, 20, 800, 80)
    assert crop_rectangle(1000, 100, middle, 0.2, max_padding_pixels=50) == (350, 20, 650, 80)


@given(sizes, sizes, valid_boxes)
def test_an_outline_touches_the_image(width, height, box):
    left, top, right, bottom = outline_rectangle(width, height, box.bbox_2d)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height


# --- iou and penalties ------------------------------------------------------------------------


def test_iou_equals_the_authors():
    for case in golden("iou"):
        assert iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-12)


@given(valid_boxes, valid_boxes)
def test_iou_is_symmetric_and_between_0_and_1(a, b):
    assert 0 <= iou(a.bbox_2d, b.bbox_2d) <= 1
    assert iou(a.bbox_2d, b.bbox_2d) == iou(b.bbox_2d, a.bbox_2d)
    assert iou(a.bbox_2d, a.bbox_2d) == 1


def box(*bbox, label="cup"):
    return Box(bbox, label)


def test_two_boxes_on_the_same_thing_are_penalised_only_above_half_overlap():
    assert boxes.perceiver_penalty([box(0, 0, 30, 10), box(0, 0, 15, 10)]) == (False, False)
    assert boxes.perceiver_penalty([box(0, 0, 30, 10), box(0, 0, 16, 10)]) == (True, False)


@pytest.mark.parametrize("label", ["", "  ", "description", "Description "])
def test_a_label_that_says_nothing_is_penalised(label):
    assert boxes.perceiver_penalty([box(0, 0, 1, 1, label=label)]) == (False, True)


def test_a_label_may_contain_the_word_description():
    labelled = box(0, 0, 1, 1, label="description of the shop")
    assert boxes.perceiver_penalty([labelled]) == (False, False)


def test_penalties_look_beyond_the_boxes_that_are_cropped():
    apart = [box(i * 10, 0, i * 10 + 5, 5) for i in range(boxes.MAX_CROPS + 1)]
    assert boxes.perceiver_penalty(apart) == (False, False)
    assert boxes.perceiver_penalty([*apart, apart[-1]]) == (True, False)
    assert boxes.perceiver_penalty([*apart, box(900, 0, 950, 5, label="")]) == (False, True)


def test_asking_for_the_whole_image_is_not_penalised():
    assert boxes.perceiver_penalty([]) == (False, False)
