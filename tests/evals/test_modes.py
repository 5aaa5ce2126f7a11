"""Modes by name, their options, and boxes that come from elsewhere."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from p2r_jax.evals.modes import GRID, LIVE_MODES, MODES, donors, parse_modes, random_boxes


class TestNames:
    def test_every_mode_has_its_own(self):
        assert [mode.name for mode in parse_modes(MODES)] == list(MODES)
        assert [m.name for m in parse_modes(LIVE_MODES, partner=True)] == list(LIVE_MODES)

    def test_thinking_is_what_the_authors_call_the_baseline(self):
        thinking, baseline = parse_modes(["thinking", "baseline"])
        assert thinking.name == "thinking"
        assert (thinking.role, thinking.boxes) == (baseline.role, baseline.boxes)

    def test_options_change_what_is_shown_and_nothing_else(self):
        plain, few, exact = parse_modes(["p2r", "p2r:crops=1", "p2r:padding=0,crops=5"])
        assert (plain.shown.crops, plain.shown.padding) == (3, 0.1)
        assert (few.shown.crops, few.shown.padding) == (1, 0.1)
        assert (exact.shown.crops, exact.shown.padding) == (5, 0.0)
        assert {mode.boxes for mode in (plain, few, exact)} == {"perceiver"}
        assert exact.name == "p2r:padding=0,crops=5"

    @pytest.mark.parametrize(
        "names, message",
        [
            ([], "unknown evaluation mode"),
            (["p2rr"], r"\['p2rr'\]; choose from default"),
            (["live_reasoner"], r"\['live_reasoner'\]"),
            (["p2r", "p2r"], "twice"),
            (["p2r:crops"], "'crops' must be crops=0 to 8"),
            (["p2r:crops=9"], "'crops=9' must be"),
            (["p2r:crops=1.5"], "'crops=1.5' must be"),
            (["p2r:padding=2"], "'padding=2' must be"),
            (["p2r:padding=nan"], "'padding=nan' must be"),
            (["p2r:colour=red"], "'colour=red' must be"),
            (["default:crops=1"], "default takes no options"),
            (["grid:crops=1"], "grid takes no options"),
        ],
    )
    def test_what_there_is_not_is_refused_by_name(self, names, message):
        with pytest.raises(ValueError, match=message):
            parse_modes(names)


def test_the_grid_covers_the_image_once():
    corners = [box.bbox_2d for box in GRID]
    assert sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in corners) == 1000**2
    assert len(set(corners)) == 4


def test_random_boxes_keep_their_size_and_depend_on_row_and_seed_only():
    given_boxes = [(100.0, 200.0, 250.0, 260.0), (0.0, 0.0, 1000.0, 5.0)]
    first, again = random_boxes("a", given_boxes, 0), random_boxes("a", given_boxes, 0)
    assert first == again
    for box, (x1, y1, x2, y2) in zip(first, given_boxes, strict=True):
        left, top, right, bottom = box.bbox_2d
        assert (right - left, bottom - top) == pytest.approx((x2 - x1, y2 - y1))
        assert 0 <= left <= right <= 1000 + 1e-9
        assert 0 <= top <= bottom <= 1000 + 1e-9
    assert random_boxes("b", given_boxes, 0) != first
    assert random_boxes("a", given_boxes, 1) != first


class TestDonors:
    @given(st.dictionaries(st.text(min_size=1), st.integers(0, 5)), st.integers(0, 9))
    def test_another_image_if_there_is_one_whatever_the_order(self, image_of, seed):
        given_to = donors(image_of, seed)
        assert given_to == donors(dict(reversed(image_of.items())), seed)
        assert given_to.keys() == image_of.keys()
        for own, donor in given_to.items():
            foreign = any(image != image_of[own] for image in image_of.values())
            assert (image_of[donor] != image_of[own]) is foreign
            assert (donor != own) is (len(image_of) > 1)

    def test_seeds_deal_differently(self):
        image_of = {str(i): i for i in range(20)}
        assert donors(image_of, 0) != donors(image_of, 1)
