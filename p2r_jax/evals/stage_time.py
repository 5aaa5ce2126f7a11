"""Where the seconds of a run went: by stage, step by step and phase by phase.

    rows of metrics.jsonl --stage_time--> StageTime(totals by phase, a chart of seconds per step)

`time/step` is a whole step; what its stages leave over is "other". Evaluations, saving and the
export lie outside of steps.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from p2r_jax.evals.chart_axes import NARROW, WIDE, Axes, ticks
from p2r_jax.evals.chart_phases import (
    Phase,
    Row,
    bands_of,
    extent_of,
    is_evaluation,
    is_step,
    phase_at,
    phases_of,
)
from p2r_jax.evals.charts import Chart, Drawing, hover_data
from p2r_jax.evals.run_folder import is_number

STAGES = {
    "encode": "images to features",
    "prefill": "prompts",
    "decode": "completions",
    "partner": "the other role's part",
    "reward": "grading",
    "reference": "log-probs of the KL's reference",
    "update": "forward, backward, optimizer",
    "evaluation": "held-out questions",
    "save": "checkpoints",
}
"""Stages with a colour of their own, in the order of a step. All others share the next one."""

OTHER_STYLE = len(STAGES)
OUTSIDE = ("evaluation", "save", "export")
"""Stages that are no part of `time/step`."""

MAX_BARS = 120
"""A longer run has the mean of several steps in a bar."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Seconds by stage of a stretch of the run. `steps` is 0 where nothing was trained."""

    label: str
    steps: int
    seconds: dict[str, float]
    compiling: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def per_step(self) -> float | None:
        """Seconds of a step, without what lies outside of steps."""
        inside = sum(value for stage, value in self.seconds.items() if stage not in OUTSIDE)
        return inside / self.steps if self.steps else None


@dataclasses.dataclass(frozen=True)
class StageTime:
    """`spans`: what came before training, each phase. `stages` in order of display."""

    whole: Span
    spans: list[Span]
    stages: list[str]
    chart: Chart | None
    cut: int
    """Bars of the chart that are longer than it is high."""
    bar_steps: int
    """Steps of a bar."""

    @classmethod
    def of(cls, seconds: Mapping[str, float]) -> StageTime | None:
        """Of the whole run alone; None if nothing took time."""
        spent = {stage: value for stage, value in seconds.items() if value > 0}
        return cls(Span("whole run", 0, spent, 0.0), [], list(spent), None, 0, 1) if spent else None

    def style(self, stage: str) -> int:
        """Colour of a stage."""
        return style_of(stage)

    def about(self, stage: str) -> str:
        """What a stage does, "" if unknown."""
        return STAGES.get(stage, "")

    def parts(self, span: Span) -> list[tuple[int, str, float]]:
        """(colour, name, seconds) of a span, stages without a colour as one."""
        shown = [(style_of(s), s, span.seconds[s]) for s in self.stages if span.seconds.get(s)]
        parts = [part for part in shown if part[0] != OTHER_STYLE]
        rest = sum(seconds for style, _, seconds in shown if style == OTHER_STYLE)
        return [*parts, (OTHER_STYLE, "other", rest)] if rest else parts


def style_of(stage: str) -> int:
    """Colour of a stage."""
    return list(STAGES).index(stage) if stage in STAGES else OTHER_STYLE


def stage_time(rows: Sequence[Row], summary: Mapping[str, float] | None = None) -> StageTime | None:
    """None if the rows have no seconds.

    summary: seconds by stage as summary.json has them; it alone knows what came after the last
    row, such as the export.
    """
    rows = [row for row in rows if is_step(row.get("step"))]
    # Of rows that were written twice, the last one counts.
    unique = {(int(row["step"]), is_evaluation(row), str(row.get("name"))): row for row in rows}
    timed = [(row, stages_of(row)) for row in unique.values()]
    timed = [(row, seconds) for row, seconds in timed if seconds]
    if not timed:
        return None
    phases = phases_of(rows)
    groups: dict[int, list[tuple[Row, dict[str, float]]]] = collections.defaultdict(list)
    for row, seconds in timed:
        before = not phases or int(row["step"]) < phases[0].first
        groups[-1 if before else phase_at(phases, int(row["step"]))].append((row, seconds))
    spans = [
        _span(phases[i].label if i >= 0 else "before training", groups[i]) for i in sorted(groups)
    ]
    whole = _span("whole run", timed)
    for stage in OUTSIDE:
        late = (summary or {}).get(stage, 0.0)
        if late > whole.seconds.get(stage, 0.0):
            whole.seconds[stage] = late
    order = [*STAGES, *sorted(whole.seconds.keys() - {*STAGES, "other"}), "other"]
    steps = [(int(row["step"]), s) for row, s in timed if not is_evaluation(row)]
    chart, cut, bar_steps = (
        _chart(sorted(steps, key=lambda item: item[0]), phases, extent_of(rows))
        if steps
        else (None, 0, 1)
    )
    stages = [stage for stage in order if whole.seconds.get(stage)]
    return StageTime(whole, spans, stages, chart, cut, bar_steps)


def stages_of(row: Row) -> dict[str, float]:
    """Seconds by stage of a row; what no stage accounts for is "other"."""
    seconds = {
        name.removeprefix("time/"): float(value)
        for name, value in row.items()
        if name.startswith("time/") and is_number(value) and value >= 0
    }
    step = seconds.pop("step", None)
    if step is not None:
        inside = sum(value for name, value in seconds.items() if name not in OUTSIDE)
        seconds["other"] = seconds.get("other", 0.0) + max(0.0, step - inside)
    return seconds


def _span(label: str, rows: Iterable[tuple[Row, Mapping[str, float]]]) -> Span:
    totals: dict[str, float] = collections.defaultdict(float)
    compiling, steps = 0.0, 0
    for row, seconds in rows:
        steps += not is_evaluation(row)
        spent = row.get("compile/seconds")
        compiling += spent if is_number(spent) else 0.0
        for stage, value in seconds.items():
            totals[stage] += value
    return Span(label, steps, dict(totals), compiling)


def _chart(
    steps: Sequence[tuple[int, Mapping[str, float]]],
    phases: Sequence[Phase],
    extent: tuple[int, int],
) -> tuple[Chart, int, int]:
    """Stacked bars of seconds per step."""
    size = math.ceil(len(steps) / MAX_BARS)
    # (first step, last step, seconds by colour)
    bars: list[tuple[int, int, list[float]]] = []
    for _, of_phase in itertools.groupby(steps, lambda item: phase_at(phases, item[0])):
        own = list(of_phase)
        for start in range(0, len(own), size):
            bucket = own[start : start + size]
            heights = [0.0] * (OTHER_STYLE + 1)
            for _, seconds in bucket:
                for stage, value in seconds.items():
                    heights[style_of(stage)] += value / len(bucket)
            bars.append((bucket[0][0], bucket[-1][0], heights))
    totals = sorted(sum(heights) for _, _, heights in bars)
    # The first step of a phase compiles: it must not squeeze all others.
    usual = totals[math.ceil(0.9 * len(totals)) - 1]
    limit = totals[-1] if totals[-1] <= 2 * usual else 1.2 * usual
    y_values = ticks(0.0, limit) if limit > 0 else [0.0, 1.0]
    top = y_values[-1]
    drawings = [_drawing(bars, phases, Axes(frame, *extent, y_values)) for frame in (WIDE, NARROW)]
    names = [*STAGES, "other"]
    series = [
        {
            "name": name,
            "step": [last for _, last, _ in bars],
            "value": [float(f"{heights[style]:.4g}") for _, _, heights in bars],
            "mean": None,
            "range": None,
        }
        for style, name in enumerate(names)
        if any(heights[style] for _, _, heights in bars)
    ]
    mean = sum(sum(seconds.values()) for _, seconds in steps) / len(steps)
    shown = [(style, name) for style, name in enumerate(names) if any(b[2][style] for b in bars)]
    description = f"Seconds per step by stage, {len(steps)} steps, mean {mean:.3g} s"
    chart = Chart(
        title="seconds per step, by stage",
        about="",
        description=description,
        latest=None,
        legend=[(style, name, None) for style, name in shown],
        drawings=drawings,
        hover=hover_data(extent, series, unit=" s", stacked=True),
    )
    return chart, sum(total > top for total in totals), size


def _drawing(
    bars: Sequence[tuple[int, int, Sequence[float]]],
    phases: Sequence[Phase],
    axes: Axes,
) -> Drawing:
    top = axes.y_values[-1]
    paths: dict[int, list[str]] = collections.defaultdict(list)
    cut = []
    for first, last, heights in bars:
        # A step's bar lies left of its mark on the axis: it leads there.
        left, right = axes.x(max(axes.first, first - 1)), axes.x(last)
        if right - left < 0.5:  # One step in all.
            left, right = left - 8, right + 8
        gap = min(1.0, (right - left) / 6)
        base = 0.0
        for style, height in enumerate(heights):
            low, high = min(base, top), min(base + height, top)
            base += height
            if high > low:
                y_low, y_high = axes.y(low), axes.y(high)
                box = f"M{left + gap:.2f},{y_high:g}H{right - gap:.2f}V{y_low:g}H{left + gap:.2f}Z"
                paths[style].append(box)
        if base > top:
            cut.append((round((left + right) / 2, 2), round(min(4.0, (right - left) / 2 - gap), 2)))
    return Drawing(
        frame=axes.frame,
        bands=bands_of(phases, axes),
        x_ticks=axes.x_ticks(),
        y_ticks=axes.y_ticks(lambda v: f"{v:g} s"),
        bars=[(style, "".join(boxes)) for style, boxes in sorted(paths.items())],
        cut=cut,
    )
