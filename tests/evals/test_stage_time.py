"""Where seconds went: sums by stage and phase, and the chart of seconds per step."""

from __future__ import annotations

import collections
import re

import pytest

from p2r_jax.evals.chart_axes import WIDE
from p2r_jax.evals.stage_time import STAGES, StageTime, stage_time, style_of


def rows_of_two_phases() -> list[dict]:
    """Steps of 10 s: 3 s decode, 5 s update, 2 s that nothing accounts for."""
    rows = [{"step": 0, "phase": "eval", "name": "before", "time/evaluation": 100.0}]
    for step in range(1, 7):
        number = 1 + (step > 4)
        row = {"step": step, "phase": ("perceiver", "reasoner")[number - 1], "round": 1}
        row |= {"phase_number": number, "reward/mean": 0.5}
        row |= {"time/decode": 3.0, "time/update": 5.0, "time/step": 10.0}
        row |= {"compile/seconds": 4.0 if step == 1 else 0.0}
        if step == 2:
            row["time/evaluation"] = 20.0
        if step == 5:
            row["time/save"] = 1.0
        rows.append(row)
        if step in (4, 6):
            rows.append({"step": step, "phase": "eval", "name": f"{step}", "time/evaluation": 50.0})
    return rows


def heights(time: StageTime, frame: int = 0) -> dict[int, list[float]]:
    """Seconds of each bar's boxes, by colour, read off the drawing; 0 s to the top's tick."""
    drawing = time.chart.drawings[frame]
    top = float(drawing.y_ticks[-1][1].removesuffix(" s"))
    scale = top / (drawing.frame.bottom - drawing.frame.top)
    found = collections.defaultdict(list)
    for style, path in drawing.bars:
        for high, low in re.findall(r"M[\d.]+,([\d.]+)H[\d.]+V([\d.]+)H", path):
            found[style].append((float(low) - float(high)) * scale)
    return dict(found)


def test_every_second_is_counted_once_and_in_its_phase():
    time = stage_time(rows_of_two_phases())
    assert [(span.label, span.steps) for span in time.spans] == [
        ("before training", 0),
        ("round 1 perceiver", 4),
        ("round 1 reasoner", 2),
    ]
    before, perceiver, reasoner = (span.seconds for span in time.spans)
    assert before == {"evaluation": 100}
    assert perceiver == {"decode": 12, "update": 20, "other": 8, "evaluation": 70}
    assert reasoner == {"decode": 6, "update": 10, "other": 4, "evaluation": 50, "save": 1}
    assert time.whole.total == sum(span.total for span in time.spans) == 281
    assert (time.whole.per_step, time.spans[0].per_step) == (10, None)
    assert (time.whole.compiling, time.spans[1].compiling) == (4, 4)


def test_a_row_that_was_written_twice_counts_once():
    rows = rows_of_two_phases()
    assert stage_time(rows + rows[3:6]).whole == stage_time(rows).whole


def test_the_summary_adds_what_came_after_the_last_row():
    time = stage_time(rows_of_two_phases(), {"export": 9.0, "save": 2.5, "decode": 99.0})
    assert time.whole.seconds["export"] == 9.0
    assert time.whole.seconds["save"] == 2.5
    assert time.whole.seconds["decode"] == 18.0
    assert time.stages == ["decode", "update", "evaluation", "save", "export", "other"]


def test_small_stages_share_a_colour():
    rows = [{"step": 1, "time/data": 1.0, "time/upload": 2.0, "time/decode": 4.0, "time/step": 8.0}]
    time = stage_time(rows)
    assert time.parts(time.whole) == [
        (style_of("decode"), "decode", 4.0),
        (len(STAGES), "other", 4.0),
    ]


@pytest.mark.parametrize("frame", [0, 1])
def test_bars_are_as_high_as_a_step_is_long(frame):
    found = heights(stage_time(rows_of_two_phases()), frame)
    assert found[style_of("decode")] == pytest.approx([3] * 6, abs=0.1)
    assert found[style_of("update")] == pytest.approx([5] * 6, abs=0.1)
    assert found[style_of("other")] == pytest.approx([2] * 6, abs=0.1)
    assert found[style_of("save")] == pytest.approx([1], abs=0.1)


def test_a_bar_that_is_far_longer_than_the_others_is_cut_and_marked():
    usual = {"time/decode": 3.0, "time/update": 5.0, "time/step": 8.0}
    rows = [{"step": step, "phase": "perceiver", **usual} for step in range(1, 41)]
    rows[0] |= {"time/update": 995.0, "time/step": 998.0}
    time = stage_time(rows)
    assert time.cut == len(time.chart.drawings[0].cut) == 1
    assert sum(h[0] for h in heights(time).values()) < 12
    update = next(s for s in time.chart.hover["series"] if s["name"] == "update")
    assert update["value"][0] == 995.0  # The script shows the truth.


def test_a_long_run_has_means_of_several_steps_that_do_not_cross_a_phase():
    rows = [
        {"step": s, "phase": "ab"[s > 500], "phase_number": 1 + (s > 500), "time/update": s % 2}
        for s in range(1, 1001)
    ]
    time = stage_time(rows)
    assert time.bar_steps == 9
    steps = time.chart.hover["series"][0]["step"]
    assert len(steps) <= 120
    assert 500 in steps
    assert heights(time)[style_of("update")] == pytest.approx([0.5] * len(steps), abs=0.11)


def test_bars_lead_up_to_their_step():
    time = stage_time(rows_of_two_phases())
    boxes = dict(time.chart.drawings[0].bars)[style_of("decode")]
    rights = [float(x) for x in re.findall(r"H([\d.]+)V", boxes)]
    width = (WIDE.last_x - WIDE.first_x) / 6
    assert rights == pytest.approx([WIDE.first_x + width * (i + 1) for i in range(6)], abs=1.1)


def test_nothing_timed_is_none():
    assert stage_time([]) is None
    assert stage_time([{"step": 1, "reward/mean": 1.0}]) is None
    assert stage_time([{"step": 1, "time/decode": "soon", "time/update": float("nan")}]) is None
    assert StageTime.of({}) is None
    assert StageTime.of({"decode": 3.0, "update": 0.0}).whole.seconds == {"decode": 3.0}
