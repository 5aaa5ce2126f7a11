"""Where things go in a chart: the frame, round ticks, curves that are smoothed and thinned.

Coordinates are pixels of a fixed view box; a browser scales it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

Point = tuple[int, float]
"""A step and a value."""

MAX_POINTS = 600
"""Longer curves are thinned to about this many points, keeping every bucket's extremes."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """The view box, and edges of the plotting area inside it."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    margin: int = 8
    """Between those edges and the first and last step: intervals stand side by side there too."""

    @property
    def first_x(self) -> int:
        """Pixel of the first step."""
        return self.left + self.margin

    @property
    def last_x(self) -> int:
        """Pixel of the last step."""
        return self.right - self.margin


SMALL = Frame(320, 168, 44, 312, 20, 146)
WIDE = Frame(1200, 300, 48, 1188, 22, 276)
NARROW = Frame(320, 230, 40, 314, 20, 208)
"""What stands in for `WIDE` in a narrow window, where its text would be too small."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """Steps and values on a frame. The value axis ends at its outermost ticks."""

    frame: Frame
    first: int
    last: int
    y_values: Sequence[float]

    def x(self, step: float, shift: float = 0.0) -> float:
        """Pixel of a step, moved to the right by `shift`."""
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        frame = self.frame
        return round(frame.first_x + share * (frame.last_x - frame.first_x) + shift, 2)

    def y(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self.y_values[0], self.y_values[-1]
        share = (value - low) / (high - low)
        return round(self.frame.bottom - share * (self.frame.bottom - self.frame.top), 2)

    def x_ticks(self) -> list[tuple[float, str]]:
        """Whole steps, as many as there is room for."""
        if self.first == self.last:
            return [(self.x(self.first), tick_text(self.first))]
        count = 5 if self.frame.width < 600 else 12
        values = ticks(self.first, self.last, count)
        inside = [v for v in values if self.first <= v <= self.last and v == int(v)]
        return [(self.x(v), tick_text(v)) for v in inside]

    def y_ticks(self, text: Callable[[float], str] | None = None) -> list[tuple[float, str]]:
        """All of them. text: how they read, `tick_text` by default."""
        return [(self.y(v), (text or tick_text)(v)) for v in self.y_values]


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
    # A thousandth of a step is no pixel: a KL of -1e-9 needs no tick below 0.
    start, stop = math.floor(low / step + 1e-3), math.ceil(high / step - 1e-3)
    return [float(f"{i * step:.10g}") for i in range(start, stop + 1)]


def tick_text(value: float) -> str:
    """A short axis label: 0.25, 12k, 1e-6."""
    size = abs(value)
    if size >= 1e4:
        for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit:
                return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}".replace("e-0", "e-")


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


def thinned(points: Sequence[Point], total: int) -> list[Point]:
    """`points`, a piece of a curve of `total` points, at the density that total allows."""
    if total <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * total / MAX_POINTS)
    kept = set()
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept |= {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(kept | {points[0], points[-1]})


def path(pieces: Iterable[Sequence[Point]], axes: Axes, shift: float = 0.0) -> str:
    """SVG path data of a curve in pieces. shift: pixels to the right."""
    return "".join(
        "M" + "L".join(f"{axes.x(s, shift):g},{axes.y(v):g}" for s, v in piece)
        for piece in pieces
        if piece
    )


def area(low: Sequence[Point], high: Sequence[Point], axes: Axes) -> str:
    """SVG path data of the area between two curves over the same steps."""
    corners = [*low, *reversed(high)]
    return "M" + "L".join(f"{axes.x(s):g},{axes.y(v):g}" for s, v in corners) + "Z"
