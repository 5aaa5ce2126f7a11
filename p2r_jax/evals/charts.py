"""Training curves for the report: metric rows to plain geometry that a template draws as SVG.

    rows of metrics.jsonl --curves--> Curves(groups of charts, phases, smoothing span)

A row is {"step", "phase", "round", ..., "<prefix>/<name>": float}.  One chart per metric, grouped
by families of prefixes; evaluation metrics `eval/<mode>/<name>` share one chart per name with a
line per mode.
All charts have the same x axis, the global step, so that phases line up down the page.
Coordinates are in pixels of a fixed view box (`WIDTH` x `HEIGHT`); a browser scales them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 44, 312, 20, 146
"""Edges of the plotting area inside the view box."""

MAX_POINTS = 600
"""Longer curves are thinned to about this many points, keeping every bucket's extremes."""

_FAMILIES = {
    "Accuracy and reward": ("eval", "reward"),
    "What the roles write": ("perceiver", "reasoner", "completion", "boxes"),
    "Optimization": ("loss", "kl", "entropy", ""),
}
"""Prefixes that are read together.  Others stand alone, or under "Other" with one chart each."""

_NOT_METRICS = {"step", "phase_step", "round"}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps trained with one role.  `left` and `right` are pixels."""

    name: str
    round: int | None
    first: int
    last: int
    left: float = 0.0
    right: float = 0.0
    style: int = 0

    @property
    def label(self) -> str:
        return self.name if self.round is None else f"{self.name} {self.round}"


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.  `raw` and `smooth` are SVG path data; `dots` are (x, y, low y, high y)."""

    name: str
    raw: str
    smooth: str
    dots: list[tuple[float, float, float | None, float | None]]
    style: int


@dataclasses.dataclass(frozen=True)
class Chart:
    """One small multiple.  `hover` is what the page's script reads to show values."""

    title: str
    description: str
    latest: float | None
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bad_steps: list[float]
    hover: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ChartGroup:
    name: str
    charts: list[Chart]
    opened: bool


@dataclasses.dataclass(frozen=True)
class Curves:
    groups: list[ChartGroup]
    phases: list[Phase]
    span: int
    steps: int


def curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    """Lays out every numeric metric of `rows`.

    Rows may come in any order and repeat steps (a resumed run replays some): the last one wins.
    Values that are not finite are left out of the line and marked on the axis.  Rows without an
    integer `step` are ignored.
    """
    rows = [r for r in rows if _is_step(r.get("step"))]
    if not rows:
        return Curves([], [], 1, 0)
    table: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_METRICS and isinstance(value, (int, float)):
                table[name][int(row["step"])] = float(value)

    steps = [int(row["step"]) for row in rows]
    first, last = min(steps), max(steps)
    phases = _phases(rows, first, last)
    span = max(3, min(50, round((last - first + 1) / 15)))

    panels: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for name in table:
        parts = name.split("/")
        if parts[0] == "eval" and len(parts) > 2:
            panels["eval", "/".join(["eval", *parts[2:]])][parts[1]] = name
        else:
            panels[parts[0] if len(parts) > 1 else "", name][""] = name
    for limit in ("eval/low", "eval/high", "eval/n"):
        panels.pop(("eval", limit), None)  # Drawn as whiskers of the accuracy.

    counts = collections.Counter(prefix for prefix, _ in panels)
    groups: dict[str, list[Chart]] = {family: [] for family in _FAMILIES}
    for (prefix, title), members in sorted(panels.items(), key=_prefix_rank):
        alone = prefix if counts[prefix] > 1 else "Other"
        family = next((f for f, known in _FAMILIES.items() if prefix in known), alone)
        chart = _chart(title, members, table, phases, (first, last), span)
        groups.setdefault(family, []).append(chart)
    known = any(groups[family] for family in _FAMILIES)
    return Curves(
        [ChartGroup(n, c, n in _FAMILIES or not known) for n, c in groups.items() if c],
        phases,
        span,
        phases[-1].last - phases[0].first + 1 if phases else last - first + 1,
    )


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential mean with weight 2 / (span + 1), corrected for its start.

    >>> smoothed([1.0, 1.0, 4.0], span=3)[:2]
    [1.0, 1.0]
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    means = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        means.append(total / weight)
    return means


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high].

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high, count = low - pad, high + pad, 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(start, stop + 1)]


def tick_text(value: float) -> str:
    """A short axis label: 0.25, 12k, 1e-6."""
    size = abs(value)
    if size >= 1e4:
        for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit:
                return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}".replace("e-0", "e-")


def _chart(
    title: str,
    members: Mapping[str, str],
    table: Mapping[str, Mapping[int, float]],
    phases: Sequence[Phase],
    extent: tuple[int, int],
    span: int,
) -> Chart:
    finite = {
        label: sorted((s, v) for s, v in table[name].items() if math.isfinite(v))
        for label, name in members.items()
    }
    bad = sorted(
        {s for name in members.values() for s, v in table[name].items() if not math.isfinite(v)}
    )
    limits = {label: _limits(table, name) for label, name in members.items()}
    values = [v for points in finite.values() for _, v in points]
    values += [v for bounds in limits.values() for pair in bounds.values() for v in pair]
    y_values = ticks(min(values), max(values)) if values else [0.0, 1.0]

    def x_of(step: float) -> float:
        return _x(step, extent)

    def y_of(value: float) -> float:
        share = (value - y_values[0]) / (y_values[-1] - y_values[0])
        return round(BOTTOM - share * (BOTTOM - TOP), 2)

    lines: list[Line] = []
    hover: list[dict[str, Any]] = []
    latest = None
    sparse = title.startswith("eval/")
    for style, (label, points) in enumerate(finite.items()):
        # A phase changes what is trained, so a mean that runs across the boundary would lie.
        pieces = [points] if sparse else _split(points, phases)
        means = [
            list(zip(_column(p, 0), smoothed(_column(p, 1), span), strict=True)) for p in pieces
        ]
        thin = [_thinned(piece, len(points)) for piece in pieces]
        dots = [
            (
                x_of(s),
                y_of(v),
                *(map(y_of, limits[label][s]) if s in limits[label] else (None,) * 2),
            )
            for s, v in points
            if sparse or len(points) == 1
        ]
        draw_means = not sparse and len(points) > 4
        lines.append(
            Line(
                label,
                _path(thin, x_of, y_of),
                _path([_thinned(m, len(points)) for m in means], x_of, y_of) if draw_means else "",
                dots,
                style % 6,
            )
        )
        kept = [point for piece in thin for point in piece]
        if points:
            latest = means[-1][-1][1] if draw_means else points[-1][1]
        by_step = dict(point for piece in means for point in piece)
        hover.append(
            {
                "name": label,
                "step": _column(kept, 0),
                "value": [_short(v) for v in _column(kept, 1)],
                "mean": [_short(by_step[s]) for s, _ in kept] if draw_means else None,
                "y": [y_of(v) for v in _column(kept, 1)],
            }
        )
    return Chart(
        title,
        _describe(title, finite, bad),
        latest if len(members) == 1 else None,
        lines,
        [(x_of(t), tick_text(t)) for t in _step_ticks(extent)],
        [(y_of(t), tick_text(t)) for t in y_values],
        [x_of(s) for s in bad],
        {"first": extent[0], "last": extent[1], "series": hover},
    )


def _phases(rows: Iterable[Mapping[str, Any]], first: int, last: int) -> list[Phase]:
    seen = {
        int(row["step"]): (row["phase"], row.get("round"))
        for row in rows
        # A row of evaluation results alone may stand between phases.
        if isinstance(row.get("phase"), str) and not _is_evaluation(row)
    }
    runs: list[tuple[str, int | None, int, int]] = []
    for step in sorted(seen):
        name, number = seen[step]
        number = number if _is_step(number) else None
        if runs and runs[-1][:2] == (name, number):
            runs[-1] = (name, number, runs[-1][2], step)
        else:
            runs.append((name, number, step, step))
    names = list(dict.fromkeys(run[0] for run in runs))
    edges = [*(_x(run[2], (first, last)) for run in runs), RIGHT]
    return [
        Phase(*run, left=left if i else LEFT, right=right, style=names.index(run[0]) % 4)
        for i, (run, left, right) in enumerate(zip(runs, edges, edges[1:], strict=False))
    ]


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    own = {*_NOT_METRICS, "phase", "name"}
    return row["phase"] == "eval" or all(k.startswith("eval/") for k in row if k not in own)


def _split(points: Sequence[tuple[int, float]], phases: Sequence[Phase]) -> list[list]:
    pieces: list[list] = [[]]
    starts = [phase.first for phase in phases[1:]]
    for step, value in points:
        while starts and step >= starts[0]:
            starts.pop(0)
            pieces.append([])
        pieces[-1].append((step, value))
    return [piece for piece in pieces if piece]


def _limits(table: Mapping[str, Mapping[int, float]], name: str) -> dict[int, tuple[float, float]]:
    if not name.endswith("/accuracy"):
        return {}
    stem = name.removesuffix("accuracy")
    low, high = table.get(stem + "low", {}), table.get(stem + "high", {})
    shared = low.keys() & high.keys() & table[name].keys()
    return {s: (low[s], high[s]) for s in shared if math.isfinite(low[s] + high[s])}


def _thinned(points: Sequence[tuple[int, float]], total: int) -> list[tuple[int, float]]:
    """`points`, a piece of a curve of `total` points, at the density that total allows."""
    if total <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * total / MAX_POINTS)
    kept = set()
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept |= {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(kept | {points[0], points[-1]})


def _path(pieces, x_of, y_of) -> str:
    return "".join(
        "M" + "L".join(f"{x_of(s):g},{y_of(v):g}" for s, v in piece) for piece in pieces if piece
    )


def _x(step: float, extent: tuple[int, int]) -> float:
    first, last = extent
    share = (step - first) / (last - first) if last > first else 0.5
    return round(LEFT + share * (RIGHT - LEFT), 2)


def _step_ticks(extent: tuple[int, int]) -> list[float]:
    first, last = extent
    if first == last:
        return [first]
    return [t for t in ticks(first, last, 5) if first <= t <= last and t == int(t)]


def _describe(title: str, finite: Mapping[str, Sequence[tuple[int, float]]], bad: Sequence) -> str:
    """What a screen reader says for the picture."""
    parts = []
    for label, points in finite.items():
        values = _column(points, 1)
        if values:
            parts.append(
                f"{label or title}: {len(values)} points, first {values[0]:.4g}, last"
                f" {values[-1]:.4g}, lowest {min(values):.4g}, highest {max(values):.4g}"
            )
    if bad:
        parts.append(f"{len(bad)} steps not finite")
    return "; ".join(parts) or f"{title}: no finite value"


def _prefix_rank(panel: tuple[tuple[str, str], Any]) -> int:
    order = [prefix for known in _FAMILIES.values() for prefix in known]
    prefix = panel[0][0]
    return order.index(prefix) if prefix in order else len(order)


def _is_step(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1


def _column(points: Sequence[tuple], index: int) -> list:
    return [point[index] for point in points]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
