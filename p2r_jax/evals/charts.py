"""Training curves for the report: metric rows to plain geometry that a template draws as SVG.

    rows of metrics.jsonl --curves--> Curves(groups of charts, phases, smoothing span)

Rows of the phase "eval" are full evaluations, between phases. `chart_panels` says which metrics
share a chart. All charts have the same x axis, the global step, so that phases line up down the
page: step n is where n updates are done, so a phase reaches from the last step of the one before to
its own last step.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from p2r_jax.evals.chart_axes import (
    NARROW,
    SMALL,
    WIDE,
    Axes,
    Frame,
    Point,
    area,
    path,
    smoothed,
    thinned,
    ticks,
)
from p2r_jax.evals.chart_panels import ACCURACY, REST, Panel, panels
from p2r_jax.evals.chart_phases import (
    NOT_METRICS,
    Band,
    Phase,
    Row,
    bands_of,
    extent_of,
    is_step,
    phase_at,
    phases_of,
)

_LINE_STYLE = {"perceiver": 0, "live_perceiver": 0, "reasoner": 1, "live_reasoner": 1, "p2r": 6}
"""Lines of a role have its colour; 6 is that of the text."""

WHISKER_ROOM = 6
"""Pixels that an interval needs beside its neighbours; where there is less, it is an area."""

DOT_ROOM = 8
"""Pixels that a dot of a short evaluation needs; where there is less, the line must do."""


@dataclasses.dataclass(frozen=True)
class Dot:
    """One value, pixels; `low` and `high` are the ends of its interval. `full`: of a full
    evaluation, not of a short one."""

    x: float
    y: float
    low: float | None
    high: float | None
    full: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. `raw`, `smooth` and `area` are SVG path data."""

    name: str
    style: int
    raw: str
    smooth: str
    area: str
    dots: list[Dot]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A chart at one size. `bars` are (style, SVG path data), `cut` marks bars
    that are cut: (middle, half the width)."""

    frame: Frame
    bands: list[Band]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line] = dataclasses.field(default_factory=list)
    bad_steps: list[float] = dataclasses.field(default_factory=list)
    bars: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    cut: list[tuple[float, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Chart:
    """`drawings`: one, or two of which the window's width chooses. `description` is for a screen
    reader, `hover` is what the page's script reads to show values."""

    title: str
    about: str
    description: str
    latest: float | None
    legend: list[tuple[int, str, float | None]]
    drawings: list[Drawing]
    hover: dict[str, Any]
    bad: int = 0
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class ChartGroup:
    """`constant`: names and values of metrics that never changed; they need no chart."""

    name: str
    charts: list[Chart]
    constant: list[tuple[str, float]]
    opened: bool

    @property
    def rest(self) -> bool:
        """Whether it is what no other group wanted."""
        return self.name == REST


@dataclasses.dataclass(frozen=True)
class Curves:
    """Everything that `metrics.jsonl` says, apart from seconds."""

    groups: list[ChartGroup]
    phases: list[Phase]
    span: int
    steps: int


@dataclasses.dataclass(frozen=True)
class _Data:
    """Metrics by name and step, and what all charts share."""

    table: Mapping[str, Mapping[int, float]]
    full: Mapping[str, set[int]]
    phases: Sequence[Phase]
    extent: tuple[int, int]
    span: int


def curves(rows: Sequence[Row]) -> Curves:
    """Lays out every numeric metric of `rows`.

    Rows may come in any order and repeat steps: the last one wins. Values that are not finite are
    left out of the line and marked on the axis. Rows without an integer `step` are ignored.
    """
    rows = [row for row in rows if is_step(row.get("step"))]
    if not rows:
        return Curves([], [], 1, 0)
    table: dict[str, dict[int, float]] = collections.defaultdict(dict)
    full: dict[str, set[int]] = collections.defaultdict(set)
    every = {name for row in rows for name in row}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_METRICS and isinstance(value, (int, float)):
                # In a run with joint phases a role's line goes on in phases of its own.
                own = f"{row.get('phase')}/{name}"
                name = own if own in every else name
                table[name][int(row["step"])] = float(value)
                if row.get("phase") == "eval":
                    full[name].add(int(row["step"]))
    extent = extent_of(rows)
    phases = phases_of(rows)
    span = max(3, min(50, round((extent[1] - extent[0] + 1) / 15)))
    data = _Data(table, full, phases, extent, span)
    groups = []
    for name, found in panels(table).items():
        for panel in found:
            if panel.sparse and not panel.accuracy:
                panel.members = _merged(panel.members, table)
        flat = [panel for panel in found if _is_constant(panel, table)]
        constant = [(m, next(iter(table[m].values()))) for panel in flat for m in panel.members]
        charts = [_chart(panel, data) for panel in found if panel not in flat]
        groups.append(ChartGroup(name, charts, constant, name != REST))
    if all(group.name == REST for group in groups):
        groups = [dataclasses.replace(group, opened=True) for group in groups]
    first, last = (phases[0].first, phases[-1].last) if phases else extent
    return Curves(groups, phases, span, last - first + 1)


def _merged(members: Mapping[str, str], table: Mapping[str, Mapping[int, float]]) -> dict[str, str]:
    """Members without those that would lie on another one; that one is named for both.

    Modes that share a perceiver have the same boxes.
    """
    kept: dict[str, str] = {}
    for metric, line in members.items():
        own = table[metric].items()
        cover = next((other for other in kept if own <= table[other].items()), None)
        if cover is None:
            kept[metric] = line
        else:
            kept[cover] += f", {line}"
    return kept


def _is_constant(panel: Panel, table: Mapping[str, Mapping[int, float]]) -> bool:
    values = [value for name in panel.members for value in table[name].values()]
    enough = min(len(table[name]) for name in panel.members) > 2
    return enough and not panel.accuracy and len(set(values)) == 1 and math.isfinite(values[0])


def _chart(panel: Panel, data: _Data) -> Chart:
    scale = 100.0 if panel.accuracy else 1.0
    finite = {
        name: sorted((s, scale * v) for s, v in data.table[name].items() if math.isfinite(v))
        for name in panel.members
    }
    bad = sorted(
        {s for name in panel.members for s, v in data.table[name].items() if not math.isfinite(v)}
    )
    limits = {name: _limits(data.table, name) if panel.accuracy else {} for name in panel.members}
    values = [v for points in finite.values() for _, v in points]
    values += [v for bounds in limits.values() for pair in bounds.values() for v in pair]
    y_values = ticks(min(values), max(values)) if values else [0.0, 1.0]
    frames = (WIDE, NARROW) if panel.title == ACCURACY else (SMALL,)
    styles = _styles(list(panel.members.values()))
    drawings = []
    for frame in frames:
        axes = Axes(frame, *data.extent, y_values)
        lines = [
            _line(panel, position, styles[position], finite, limits, data, axes)
            for position in range(len(finite))
        ]
        text = (lambda v: f"{v:g} %") if panel.accuracy else None
        drawings.append(
            Drawing(
                frame,
                bands_of(data.phases, axes),
                axes.x_ticks(),
                axes.y_ticks(text),
                lines,
                [axes.x(s) for s in bad],
            )
        )
    series = [_series(panel, name, finite[name], limits[name], data) for name in finite]
    ends = [(s["mean"] or s["value"])[-1] if s["value"] else None for s in series]
    return Chart(
        f"{panel.title}, {panel.role}" if panel.role else panel.title,
        panel.about,
        _describe(panel, finite, bad),
        ends[0] if len(ends) == 1 else None,
        list(zip(styles, panel.members.values(), ends, strict=True)) if len(ends) > 1 else [],
        drawings,
        hover_data(data.extent, series, unit=" %" if panel.accuracy else ""),
        len(bad),
        " %" if panel.accuracy else "",
    )


def _line(
    panel: Panel,
    position: int,
    style: int,
    finite: Mapping[str, list[Point]],
    limits: Mapping[str, Mapping[int, tuple[float, float]]],
    data: _Data,
    axes: Axes,
) -> Line:
    name = list(finite)[position]
    points, bounds = finite[name], limits[name]
    pieces = _pieces(panel, name, points, data)
    if name.endswith(("live_perceiver/accuracy", "live_reasoner/accuracy")):
        pieces, bounds = _forked(pieces, finite, limits, name, data)
    # Side by side at every step, or none.
    whiskers = _gap(finite.values(), axes) >= WHISKER_ROOM * (len(finite) + 1)
    shift = (position - (len(finite) - 1) / 2) * WHISKER_ROOM if whiskers and bounds else 0.0
    dots = []
    alone = {piece[0][0] for piece in pieces if len(piece) == 1}
    crowded = _gap(finite.values(), axes) < DOT_ROOM
    for step, value in points if panel.sparse or len(points) == 1 else ():
        full = step in data.full.get(name, ())
        if crowded and not full and step not in alone:
            continue
        low, high = bounds.get(step, (None, None)) if whiskers or len(points) == 1 else (None, None)
        ends = [None if v is None else axes.y(v) for v in (low, high)]
        dots.append(Dot(axes.x(step, shift), axes.y(value), ends[0], ends[1], full))
    areas = "".join(
        area([(s, bounds[s][0]) for s, _ in piece], [(s, bounds[s][1]) for s, _ in piece], axes)
        for piece in pieces
        if not whiskers and len(piece) > 1 and all(s in bounds for s, _ in piece)
    )
    thin = [thinned(piece, len(points)) for piece in pieces]
    smooth = ""
    if not panel.sparse and len(points) > 4:
        means = [_means(piece, data.span) for piece in pieces]
        smooth = path([thinned(mean, len(points)) for mean in means], axes)
    return Line(panel.members[name], style, path(thin, axes, shift), smooth, areas, dots)


def _pieces(panel: Panel, name: str, points: list[Point], data: _Data) -> list[list[Point]]:
    """A curve's points by phase; a mean that runs across the boundary would lie, since a phase
    changes what is trained. Evaluations of the live weights are one piece."""
    if panel.sparse and not name.startswith(("eval/live_perceiver/", "eval/live_reasoner/")):
        return [points] if points else []
    pieces: dict[int, list[Point]] = collections.defaultdict(list)
    for step, value in points:
        pieces[phase_at(data.phases, step)].append((step, value))
    return list(pieces.values())


def _forked(
    pieces: list[list[Point]],
    finite: Mapping[str, list[Point]],
    limits: Mapping[str, Mapping[int, tuple[float, float]]],
    name: str,
    data: _Data,
) -> tuple[list[list[Point]], Mapping[int, tuple[float, float]]]:
    """Pieces that begin where p2r was at the phase's start: the frozen weights are the live ones
    there, so all three modes are the same."""
    p2r = dict(finite.get("eval/p2r/accuracy", ()))
    bounds = limits.get("eval/p2r/accuracy", {})
    forked = []
    for piece in pieces:
        phase = data.phases[phase_at(data.phases, piece[0][0])] if data.phases else None
        start = phase.first - 1 if phase else -1
        forked.append([(start, p2r[start]), *piece] if start in p2r else piece)
    return forked, dict(bounds) | dict(limits[name])


def _gap(curves_: Iterable[Sequence[Point]], axes: Axes) -> float:
    """Pixels between the closest two steps of these curves."""
    places = sorted({axes.x(step) for points in curves_ for step, _ in points})
    return min((b - a for a, b in itertools.pairwise(places)), default=math.inf)


def hover_data(
    extent: tuple[int, int], series: list[dict[str, Any]], *, unit: str, stacked: bool = False
) -> dict[str, Any]:
    """What the page's script reads. stacked: series add up, and a bar leads up to its step."""
    first, last = extent
    return {"first": first, "last": last, "unit": unit, "stacked": stacked, "series": series}


def _series(
    panel: Panel,
    name: str,
    points: list[Point],
    bounds: Mapping[int, tuple[float, float]],
    data: _Data,
) -> dict[str, Any]:
    """What the page's script shows of a curve."""
    pieces = _pieces(panel, name, points, data)
    kept = [point for piece in pieces for point in thinned(piece, len(points))]
    means = None
    if not panel.sparse and len(points) > 4:
        by_step = dict(point for piece in pieces for point in _means(piece, data.span))
        means = [_short(by_step[s]) for s, _ in kept]
    return {
        "name": panel.members[name],
        "step": [s for s, _ in kept],
        "value": [_short(v) for _, v in kept],
        "mean": means,
        "range": [[_short(v) for v in bounds[s]] if s in bounds else None for s, _ in kept]
        if bounds
        else None,
    }


def _means(piece: Sequence[Point], span: int) -> list[Point]:
    steps, values = zip(*piece, strict=True)
    return list(zip(steps, smoothed(values, span), strict=True))


def _limits(table: Mapping[str, Mapping[int, float]], name: str) -> dict[int, tuple[float, float]]:
    """Ends of an accuracy's intervals, percent."""
    stem = name.removesuffix("accuracy")
    low, high = table.get(stem + "low", {}), table.get(stem + "high", {})
    shared = low.keys() & high.keys() & table[name].keys()
    return {s: (100 * low[s], 100 * high[s]) for s in shared if math.isfinite(low[s] + high[s])}


def _styles(names: Sequence[str]) -> list[int]:
    """Colours of a chart's lines: a role's own, others in turn."""
    if len(names) == 1:
        return [0]
    fixed = [6 if name == "" else _LINE_STYLE.get(name) for name in names]
    free = [style for style in range(7) if style not in fixed]
    others = iter(free * len(names))
    return [next(others) if style is None else style for style in fixed]


def _describe(panel: Panel, finite: Mapping[str, Sequence[Point]], bad: Sequence) -> str:
    """What a screen reader says for the picture."""
    parts = []
    unit = " %" if panel.accuracy else ""
    for name, points in finite.items():
        values = [v for _, v in points]
        if values:
            parts.append(
                f"{panel.members[name] or panel.title}: {len(values)} points, first"
                f" {values[0]:.4g}{unit}, last {values[-1]:.4g}{unit}, lowest"
                f" {min(values):.4g}{unit}, highest {max(values):.4g}{unit}"
            )
    if bad:
        parts.append(f"{len(bad)} {'step' if len(bad) == 1 else 'steps'} not finite")
    return "; ".join(parts) or f"{panel.title}: no finite value"


def _short(value: float) -> float:
    return float(f"{value:.5g}")
