"""What a reasoner is shown for a list of boxes (P2R §3)."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from p2r_jax.qwen3_vl.processor import ImageSizes
from p2r_jax.roles import boxes as geometry
from p2r_jax.roles.boxes import Box
from p2r_jax.roles.evidence import Shown, gather_evidence, plain_view

SIZES = ImageSizes(patch=16, merge=2, min_pixels=4096, max_pixels=2_097_152)
HEIGHT, WIDTH = 900, 1600
BOXES = [Box((100.0 * i, 200, 100.0 * i + 80, 300), f"box {i}") for i in range(5)]


def gather(boxes, height=HEIGHT, width=WIDTH, sizes=SIZES, **options):
    return gather_evidence(height, width, boxes, sizes, Shown(**options))


def test_the_overview_comes_first_and_shows_the_whole_image():
    overview = gather(BOXES).views[0]
    assert overview.crop == (0, 0, WIDTH, HEIGHT)
    assert overview.target == SIZES.target_size(HEIGHT, WIDTH)


def test_every_box_is_drawn_although_only_three_are_cropped():
    evidence = gather(BOXES)
    assert evidence.found
    assert evidence.views[0].outlines == tuple(
        geometry.outline_rectangle(WIDTH, HEIGHT, box.bbox_2d) for box in BOXES
    )
    assert evidence.views[0].line_width == geometry.line_width(WIDTH)
    assert len(evidence.views) == 1 + 3


def test_crops_are_the_first_boxes_padded_in_order_and_never_annotated():
    crops = gather(BOXES).views[1:]
    # A box of x 100-180, y 200-300 thousandths, with a tenth of the image on each side.
    assert crops[1].crop == (0, 90, 448, 360)
    for view, box in zip(crops, BOXES, strict=False):
        assert view.crop == geometry.crop_rectangle(WIDTH, HEIGHT, box.bbox_2d)
        assert view.outlines == ()


def test_padding_is_at_most_600_pixels():
    crop = gather([Box((500, 500, 501, 501), "")], height=10_000, width=10_000).views[1].crop
    assert crop == pytest.approx((4400, 4400, 5610, 5610), abs=1)


def test_a_crop_obeys_the_budget_of_every_image():
    (crop,) = gather([Box((0, 0, 1000, 1000), "all")], 4000, 4000).views[1:]
    assert crop.target[0] * crop.target[1] <= SIZES.max_pixels
    (crop,) = gather([Box((0, 0, 10, 10), "tiny")], 100, 100).views[1:]
    assert SIZES.min_pixels <= crop.target[0] * crop.target[1] <= 2 * SIZES.min_pixels


def test_without_boxes_the_reasoner_sees_the_plain_image():
    evidence = gather([])
    assert not evidence.found
    assert evidence.views == (plain_view(HEIGHT, WIDTH, SIZES),)


def test_without_a_surviving_crop_nothing_is_drawn_either():
    # 2,000 pixels wide and, without padding, 8 high.
    sliver = Box((0, 500, 1000, 504), "horizon")
    evidence = gather([sliver], 2000, 2000, padding=0.0)
    assert not evidence.found
    assert evidence.views == (plain_view(2000, 2000, SIZES),)


def test_a_crop_longer_than_200_times_its_width_is_left_out_but_its_box_is_drawn():
    sliver, square = Box((0, 500, 1000, 504), "horizon"), Box((0, 0, 500, 500), "corner")
    evidence = gather([sliver, square], 2000, 2000, padding=0.0)
    assert evidence.found
    assert [view.crop for view in evidence.views[1:]] == [(0, 0, 1000, 1000)]
    assert len(evidence.views[0].outlines) == 2


def test_a_crop_that_is_left_out_is_not_replaced_by_a_fourth_box():
    sliver = Box((0, 500, 1000, 504), "horizon")
    evidence = gather([sliver, *BOXES], 2000, 2000, padding=0.0)
    assert len(evidence.views) == 1 + 2


def test_an_image_longer_than_200_times_its_width_is_an_error():
    with pytest.raises(ValueError, match="aspect ratio above 200"):
        gather(BOXES, 10, 2001)


corner = st.floats(0, 1000)
box_lists = st.lists(st.tuples(corner, corner, corner, corner), max_size=6)


@settings(max_examples=200, deadline=None)
@given(box_lists, st.integers(1, 3000), st.integers(1, 3000))
def test_whatever_was_parsed_gives_views_inside_the_image(corners, height, width):
    if max(height, width) > 200 * min(height, width):
        return
    text = ",".join(f'{{"bbox_2d":[{a},{b},{c},{d}],"label":"x"}}' for a, b, c, d in corners)
    boxes = geometry.parse_boxes(f"[{text}]")
    evidence = gather(boxes, height, width)
    assert 1 <= len(evidence.views) <= 4
    assert evidence.found == (len(evidence.views) > 1)
    for view in evidence.views:
        left, top, right, bottom = view.crop
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert all(side % 32 == 0 and side > 0 for side in view.target)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_any_number_of_boxes_can_be_cropped(count):
    evidence = gather(BOXES, crops=count)
    assert len(evidence.views) == 1 + count
    assert evidence.found is (count > 0)
    assert len(evidence.views[0].outlines) == (len(BOXES) if count else 0)


def test_the_outlined_image_can_be_shown_alone():
    evidence = gather(BOXES, show_crops=False)
    assert evidence.found
    assert evidence.views == gather(BOXES).views[:1]


def test_crops_can_be_shown_alone():
    assert gather(BOXES, overview="none").views == gather(BOXES).views[1:]
    nothing = gather([], overview="none")
    assert nothing.views == (plain_view(HEIGHT, WIDTH, SIZES),)
    assert not nothing.found


def test_a_smaller_budget_holds_for_every_view():
    small = gather(BOXES, budget=0.5, overview="plain")
    for view, full in zip(small.views, gather(BOXES).views, strict=True):
        height, width = view.target
        assert height * width <= SIZES.max_pixels / 2
        assert view.crop == full.crop
        assert not view.outlines
