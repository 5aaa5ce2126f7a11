"""Layout of training curves: phases, panels, smoothing, intervals, values that are not finite."""

from __future__ import annotations

import itertools
import re

import pytest

from p2r_jax.evals import chart_axes, chart_panels, charts
from p2r_jax.evals.chart_phases import bands_of, phases_of


def step_row(step: int, phase: str, number: int, **metrics: float) -> dict:
    """A row as training writes it; two phases a round."""
    where = {"phase": phase, "round": (number + 1) // 2, "phase_number": number}
    return {"step": step, **where, "x": 1.0, **metrics}


def accuracy(mode: str, value: float, half: float = 0.1) -> dict[str, float]:
    ends = {"low": value - half, "accuracy": value, "high": value + half}
    return {f"eval/{mode}/{name}": v for name, v in ends.items()}


def all_charts(rows: list[dict]) -> dict[str, charts.Chart]:
    return {c.title: c for group in charts.curves(rows).groups for c in group.charts}


def points_of(path: str) -> list[list[tuple[float, float]]]:
    """SVG path data as pieces of points."""
    pieces = [piece.split("L") for piece in path.split("M") if piece]
    return [[tuple(map(float, point.split(","))) for point in piece] for piece in pieces]


class TestPhases:
    def test_are_told_apart_by_number_and_labelled_by_round(self):
        roles = ["perceiver", "reasoner", "perceiver", "perceiver"]  # The last two: rounds 2 and 2.
        rows = [step_row(s, roles[(s - 1) // 5], (s - 1) // 5 + 1) for s in range(1, 21)]
        phases = phases_of(rows)
        assert [(p.label, p.number, p.first, p.last) for p in phases] == [
            ("round 1 perceiver", 1, 1, 5),
            ("round 1 reasoner", 2, 6, 10),
            ("round 2 perceiver", 3, 11, 15),
            ("round 2 perceiver", 4, 16, 20),
        ]
        assert [p.style for p in phases] == [0, 1, 0, 0]

    def test_without_numbers_a_change_of_role_or_round_begins_one(self):
        rows = [{"step": s, "phase": "ab"[s // 5 % 2], "round": s // 10} for s in range(20)]
        rows = [row | {"x": 1.0} for row in rows]
        assert [p.label for p in phases_of(rows)] == [
            "round 0 a",
            "round 0 b",
            "round 1 a",
            "round 1 b",
        ]

    def test_an_evaluation_between_phases_is_none_and_no_step(self):
        rows = [step_row(s, "ab"[(s - 1) // 5], 1 + (s - 1) // 5) for s in range(1, 11)]
        for step, name in ((0, "before"), (5, "after_phase1_a"), (10, "after")):
            rows.append({"step": step, "phase": "eval", "name": name, "eval/p2r/accuracy": 0.5})
        curves = charts.curves(rows)
        assert [(p.name, p.first, p.last) for p in curves.phases] == [("a", 1, 5), ("b", 6, 10)]
        assert curves.steps == 10

    def test_reach_from_the_end_of_the_one_before_to_their_own(self):
        rows = [step_row(s, "ab"[s > 5], 1 + (s > 5)) for s in range(1, 11)]
        axes = chart_axes.Axes(chart_axes.SMALL, 0, 10, [0.0, 1.0])
        bands = bands_of(phases_of(rows), axes)
        assert bands[0].left == chart_axes.SMALL.left
        assert bands[0].right == bands[1].left == axes.x(5)
        assert bands[1].right == chart_axes.SMALL.right

    def test_labels_shrink_until_they_fit(self):
        def labels(frame, rounds):
            roles = ("perceiver", "reasoner")
            rows = [step_row(s + 1, roles[s // 5 % 2], 1 + s // 5) for s in range(10 * rounds)]
            axes = chart_axes.Axes(frame, 0, 10 * rounds, [0.0, 1.0])
            return [band.label for band in bands_of(phases_of(rows), axes)]

        assert labels(chart_axes.WIDE, 1) == ["round 1 perceiver", "round 1 reasoner"]
        assert labels(chart_axes.SMALL, 2) == ["perceiver", "reasoner", "perceiver", "reasoner"]
        assert labels(chart_axes.SMALL, 3)[::2] == ["P1", "P2", "P3"]
        assert set(labels(chart_axes.SMALL, 20)) == {""}


class TestLines:
    def test_the_mean_restarts_with_a_phase(self):
        rows = [{"step": s, "phase": "ab"[s // 20], "x": float(s // 20)} for s in range(40)]
        chart = all_charts(rows)["x"]
        assert chart.hover["series"][0]["mean"] == [0.0] * 20 + [1.0] * 20
        assert chart.drawings[0].lines[0].smooth.count("M") == 2

    def test_values_that_are_not_finite_are_marked(self):
        rows = [{"step": s, "x": float("nan") if s == 3 else s / 2} for s in range(10)]
        chart = all_charts(rows)["x"]
        assert chart.bad == len(chart.drawings[0].bad_steps) == 1
        assert "1 step not finite" in chart.description
        assert "nan" not in chart.drawings[0].lines[0].raw

    def test_a_replayed_step_counts_once(self):
        rows = [{"step": s, "x": float(i)} for i, s in enumerate([0, 1, 2, 1, 2, 3])]
        (series,) = all_charts(rows)["x"].hover["series"]
        assert series["step"] == [0, 1, 2, 3]
        assert series["value"] == [0, 3, 4, 5]

    def test_long_curves_are_thinned_but_keep_their_spikes(self):
        rows = [{"step": s, "x": 100.0 if s == 7777 else 0.0} for s in range(20_000)]
        (series,) = all_charts(rows)["x"].hover["series"]
        assert len(series["step"]) <= 1.1 * chart_axes.MAX_POINTS
        assert 100.0 in series["value"]

    def test_one_row_is_enough(self):
        chart = all_charts([{"step": 4, "reward/mean": 0.5}])["reward/mean"]
        assert len(chart.drawings[0].lines[0].dots) == 1

    @pytest.mark.parametrize(
        "low, high", [(0, 1), (-0.06, 0.02), (1e-7, 3e-6), (5, 5), (0, 0), (-3e5, 2e6), (0.99, 1)]
    )
    def test_ticks_cover_the_data_with_round_numbers(self, low, high):
        values = chart_axes.ticks(low, high)
        assert values[0] <= low <= high <= values[-1]
        assert 3 <= len(values) <= 8
        assert all(len(chart_axes.tick_text(v)) <= 7 for v in values)

    def test_ticks_do_not_go_below_zero_for_a_rounding_error(self):
        assert chart_axes.ticks(-1e-9, 0.2)[0] == 0


class TestAccuracy:
    def drifting(self, every: int = 10, phase_steps: int = 40) -> list[dict]:
        """Two phases; the idle role gets worse in each."""
        rows = [{"step": 0, "phase": "eval", "name": "before", **accuracy("p2r", 0.5)}]
        rows[0] |= accuracy("oracle_box", 0.9)
        for step in range(1, 2 * phase_steps + 1):
            number = 1 + (step > phase_steps)
            row = step_row(step, ("perceiver", "reasoner")[number - 1], number)
            idle = ("live_reasoner", "live_perceiver")[number - 1]
            modes = accuracy("p2r", 0.6) | accuracy("live_perceiver", 0.7)
            modes |= accuracy("live_reasoner", 0.7) | accuracy(idle, 0.4)
            if step % phase_steps == 0:
                rows += [row, {"step": step, "phase": "eval", "name": "full", **modes}]
            else:
                rows.append(row | (modes if step % every == 0 else {}))
        return rows

    def test_the_three_modes_share_a_chart_in_percent_with_their_intervals(self):
        chart = all_charts(self.drifting())["eval/accuracy"]
        assert [name for _, name, _ in chart.legend] == ["p2r", "live_perceiver", "live_reasoner"]
        assert [latest for _, _, latest in chart.legend] == pytest.approx([60, 40, 70])
        wide, narrow = chart.drawings
        assert (wide.frame, narrow.frame) == (chart_axes.WIDE, chart_axes.NARROW)
        assert all(text.endswith(" %") for _, text in wide.y_ticks)
        p2r = wide.lines[0]
        axes = chart_axes.Axes(wide.frame, 0, 80, [float(t.split()[0]) for _, t in wide.y_ticks])
        assert (p2r.dots[1].low, p2r.dots[1].high) == (axes.y(50), axes.y(70))
        assert [dot.full for dot in p2r.dots] == [True, *[False] * 3] * 2 + [True]
        steps, ranges = (chart.hover["series"][2][key] for key in ("step", "range"))
        assert (steps[0], ranges[0]) == (10, [30.0, 50.0])

    def test_intervals_of_three_modes_stand_side_by_side(self):
        wide = all_charts(self.drifting())["eval/accuracy"].drawings[0]
        places = sorted(dot.x for line in wide.lines for dot in line.dots)
        gaps = [b - a for a, b in itertools.pairwise(places) if b - a < 20]
        assert len(gaps) == 2 * 8
        assert min(gaps) >= charts.WHISKER_ROOM - 0.1

    def test_where_they_have_no_room_they_are_areas_and_short_dots_go(self):
        wide = all_charts(self.drifting(every=1, phase_steps=300))["eval/accuracy"].drawings[0]
        for line, pieces in zip(wide.lines, (1, 2, 2), strict=True):
            assert line.area.count("Z") == pieces
            assert all(dot.low is None and dot.full for dot in line.dots)
        assert len(wide.lines[0].dots) == 3

    def test_the_idle_role_leaves_p2r_where_a_phase_begins(self):
        wide = all_charts(self.drifting())["eval/accuracy"].drawings[0]
        p2r, _, live_reasoner = (points_of(line.raw) for line in wide.lines)
        assert len(p2r) == 1
        assert len(live_reasoner) == 2
        at = {0: p2r[0][0][1], 40: p2r[0][4][1]}
        assert [piece[0][1] for piece in live_reasoner] == [at[0], at[40]]
        assert live_reasoner[0][1][1] > at[0]  # Lower on the page: it fell.
        assert live_reasoner[1][1][1] < at[40]
        # The forks are lines only: nothing was measured there.
        assert len(wide.lines[2].dots) == 8

    def test_other_modes_have_a_chart_of_their_own(self):
        found = all_charts(self.drifting())
        assert [s["name"] for s in found["eval/accuracy, other modes"].hover["series"]] == [
            "oracle_box"
        ]
        without_p2r = all_charts([{"step": 1, **accuracy("baseline", 0.5)}])
        assert "eval/accuracy, other modes" not in without_p2r
        assert without_p2r["eval/accuracy"].hover["series"][0]["name"] == "baseline"

    def test_modes_with_the_same_boxes_share_a_line(self):
        rows = [
            {"step": s, "eval/p2r/hit_rate": s / 10, "eval/live_reasoner/hit_rate": 0.5}
            | ({"eval/live_perceiver/hit_rate": s / 10} if s else {})
            for s in range(5)
        ]
        series = all_charts(rows)["eval/hit_rate"].hover["series"]
        assert [s["name"] for s in series] == ["p2r, live_perceiver", "live_reasoner"]


class TestPanels:
    def test_groups_come_in_the_order_in_which_they_are_asked_for(self):
        names = [
            "verifier/asked", "completion/length_mean", "kl/mean", "boxes/mean_area", "new/thing",
            "reward/parse_ok", "loss/anchor", "reward/mean", "reward/new", "eval/p2r/accuracy",
            "time/decode",
        ]  # fmt: skip
        rows = [dict.fromkeys(names, float(s)) | {"step": s} for s in range(5)]
        groups = charts.curves(rows).groups
        assert {g.name: [c.title for c in g.charts] for g in groups} == {
            chart_panels.REWARD: ["eval/accuracy", "reward/mean", "reward/new"],
            chart_panels.PERCEIVER: ["boxes/mean_area", "reward/parse_ok"],
            chart_panels.LOSSES: ["loss/anchor", "kl/mean"],
            chart_panels.COMPLETIONS: ["completion/length"],
            chart_panels.REST: ["verifier", "new/thing"],
        }
        assert [g.opened for g in groups] == [True] * 4 + [False]

    def test_what_is_read_together_shares_a_chart(self):
        names = ["clip_low_fraction", "dual_clip_fraction", "clip_high_fraction"]
        rows = [dict.fromkeys(names, float(s)) | {"step": s} for s in range(5)]
        (chart,) = all_charts(rows).values()
        assert [name for _, name, _ in chart.legend] == ["high", "low", "dual"]
        assert len({style for style, _, _ in chart.legend}) == 3

    def test_what_never_changes_is_said_not_drawn(self):
        rows = [{"step": s, "skipped_steps": 0, "reward/mean": s / 9} for s in range(9)]
        groups = {g.name: g for g in charts.curves(rows).groups}
        assert groups[chart_panels.REST].constant == [("skipped_steps", 0.0)]
        assert not groups[chart_panels.REST].charts
        assert not groups[chart_panels.REWARD].constant

    def test_not_finite_is_never_constant(self):
        rows = [{"step": s, "loss/policy": float("inf")} for s in range(9)]
        assert all_charts(rows)["loss/policy"].bad == 9

    def test_roles_of_a_joint_phase_are_lines_of_the_plain_metric(self):
        both = {"perceiver/reward/mean": 0.2, "reasoner/reward/mean": 0.4, "reward/mean": 0.3}
        rows = [step_row(s, "joint", 1, **{k: v + s / 99 for k, v in both.items()}) for s in (1, 2)]
        rows += [step_row(s, "reasoner", 2, **{"reward/mean": 0.9}) for s in (3, 4)]
        series = all_charts(rows)["reward/mean"].hover["series"]
        assert {s["name"]: s["step"] for s in series} == {
            "perceiver": [1, 2],
            "reasoner": [1, 2, 3, 4],  # Its own phase goes on with its line.
            "": [1, 2],
        }

    def test_panels_of_several_lines_are_split_by_role(self):
        lengths = {f"completion/length_{k}": 1.0 for k in ("mean", "min", "max")}
        own = {f"{role}/{k}": v for role in ("reasoner", "perceiver") for k, v in lengths.items()}
        rows = [step_row(s, "joint", 1, **{k: v + s for k, v in own.items()}) for s in range(1, 5)]
        found = all_charts(rows)
        titles = [title for title in found if title.startswith("completion")]
        assert titles == ["completion/length, perceiver", "completion/length, reasoner"]
        assert [n for _, n, _ in found[titles[0]].legend] == ["mean", "shortest", "longest"]

    def test_no_panel_is_described_that_no_metric_can_fill(self):
        """A typo in a title would leave its text unused."""
        known = {title for _, title, _ in chart_panels._KNOWN.values()}
        assert set(chart_panels._LINES) <= known
        combined = {m for lines in chart_panels._LINES.values() for m in lines}
        for title in known - set(chart_panels._LINES) - {chart_panels.OTHER_ACCURACY}:
            assert re.fullmatch(r"[a-z_]+(/[a-z_]+)?", title)
            assert title not in combined
