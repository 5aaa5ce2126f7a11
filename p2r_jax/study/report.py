"""One self-contained HTML page of a study: arms and contrasts as a forest plot, learning curves.

    study.json --geometry--> template --> report.html

Style sheet and curves are those of a run's report. The page has no script, and shows in light and
dark. Names and descriptions are inserted escaped.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from p2r_jax.evals.chart_axes import SMALL, Axes, area, path, ticks
from p2r_jax.evals.charts import Dot, Drawing, Line
from p2r_jax.evals.report import duration, number
from p2r_jax.study.table import interval, p_value, percent, points, si

LEFT, RIGHT, WIDTH = 190, 590, 760
"""Of a forest plot, pixels: where values begin and end; names stand left of that, numbers right."""
ROW, TOP = 26, 12
NAME_LETTERS = 26
REFERENCE_STYLE = 6
"""Colour of the first arm's curve in the charts of the others: that of text."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """One row of a forest plot, pixels. Ends are None where there is no interval."""

    name: str
    y: float
    x: float
    ends: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    text: str
    style: int


@dataclasses.dataclass(frozen=True)
class Forest:
    """Estimates with their intervals, one below the other."""

    title: str
    description: str
    height: int
    marks: list[Mark]
    ticks: list[tuple[float, str]]
    zero: float | None = None
    margin: tuple[float, float] | None = None
    left: int = LEFT
    right: int = RIGHT
    width: int = WIDTH
    top: int = TOP

    @property
    def bottom(self) -> int:
        """Of the plotting area."""
        return self.height - 24


@dataclasses.dataclass(frozen=True)
class Curve:
    """The learning curve of an arm."""

    title: str
    about: str
    description: str
    drawing: Drawing
    latest: float


def render(found: Mapping[str, Any]) -> str:
    """The page of study.json as a string."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, points=points, p_value=p_value, si=si, number=number, duration=duration
    )
    environment.filters["seconds"] = number  # Of charts of time, which there are none of here.
    environment.globals.update(interval=interval)
    return environment.get_template("study/report.html.jinja").render(
        found=found,
        study=found["study"],
        arms=arms_forest(found),
        contrasts=contrasts_forest(found),
        curves=curves(found),
        css=markupsafe.Markup(_resource("report.css")),
    )


def arms_forest(found: Mapping[str, Any]) -> Forest | None:
    """Accuracy of every arm, percent; None if nothing is finished."""
    rows = [
        (name, arm["estimate"], f"{percent(arm['estimate']['value'])} %", 0)
        for name, arm in found["arms"].items()
        if arm["estimate"]
    ]
    return _forest("Accuracy after training, %", rows) if rows else None


def contrasts_forest(found: Mapping[str, Any]) -> Forest | None:
    """Differences in points, with the margin of equivalence; None if there are none."""
    rows = [
        (
            c["name"],
            c["estimate"],
            f"{points(c['estimate']['value'])}  {c['verdict']}",
            1 if c["primary"] else REFERENCE_STYLE,
        )
        for c in found["contrasts"]
        if c["estimate"]
    ]
    margin = float(found["study"]["margin"])
    return _forest("Difference of accuracy, points", rows, margin) if rows else None


def _forest(
    title: str,
    rows: Sequence[tuple[str, Mapping[str, Any], str, int]],
    margin: float | None = None,
) -> Forest:
    names = ("value", "low", "high", "bootstrap_low", "bootstrap_high")
    # The bootstrap of very few seeds may reach to the ends of what is possible: it is cut.
    values = [100 * own[k] for _, own, _, _ in rows for k in names[:3] if own[k] is not None]
    values += [] if margin is None else [-margin, margin]
    at = ticks(min(values), max(values))
    low, high = at[0], at[-1]

    def x(value: float) -> float:
        share = (min(high, max(low, value)) - low) / (high - low)
        return round(LEFT + share * (RIGHT - LEFT), 2)

    def ends(own: Mapping[str, Any], prefix: str) -> tuple[float, float] | None:
        if own[f"{prefix}low"] is None:
            return None
        return x(100 * own[f"{prefix}low"]), x(100 * own[f"{prefix}high"])

    marks = [
        Mark(
            name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…",
            TOP + ROW * (i + 0.5),
            x(100 * own["value"]),
            ends(own, ""),
            ends(own, "bootstrap_"),
            text,
            style,
        )
        for i, (name, own, text, style) in enumerate(rows)
    ]
    said = "; ".join(f"{name} {text}" for name, _, text, _ in rows)
    return Forest(
        title,
        f"{title}: {said}",
        TOP + ROW * len(rows) + 24,
        marks,
        [(x(v), f"{v:g}") for v in at],
        None if margin is None else x(0),
        None if margin is None else (x(-margin), x(margin)),
    )


def curves(found: Mapping[str, Any]) -> list[Curve]:
    """One chart for each arm, all on the same axes, with the first arm's curve behind."""
    lines = {name: arm["curve"] for name, arm in found["arms"].items() if arm["curve"]}
    every = [point for curve in lines.values() for point in curve]
    if not every:
        return []
    shown = [100 * v for p in every for k in ("accuracy", "low", "high") if (v := p[k]) is not None]
    last = max(round(point["samples"]) for point in every)
    axes = Axes(SMALL, 0, last, ticks(min(shown), max(shown)))
    reference, first = next(iter(lines.items()))
    charts = []
    for name, curve in lines.items():
        drawn = [_line(name, 0, curve, axes)]
        if name != reference:
            behind = _line(reference, REFERENCE_STYLE, first, axes)
            drawn.insert(0, dataclasses.replace(behind, area="", dots=[]))
        values = [100 * point["accuracy"] for point in curve]
        charts.append(
            Curve(
                name,
                found["arms"][name]["description"],
                f"{name}: {len(curve)} evaluations, first {values[0]:.3g} %, last"
                f" {values[-1]:.3g} %",
                Drawing(SMALL, [], axes.x_ticks(), axes.y_ticks(lambda v: f"{v:g} %"), drawn),
                values[-1],
            )
        )
    return charts


def _line(name: str, style: int, curve: Sequence[Mapping[str, Any]], axes: Axes) -> Line:
    def along(key: str) -> list[tuple[int, float]]:
        return [(round(p["samples"]), 100 * p[key]) for p in curve if p[key] is not None]

    low, high = along("low"), along("high")
    dots = [Dot(axes.x(s), axes.y(v), None, None, False) for s, v in along("accuracy")]
    band = area(low, high, axes) if len(low) > 1 else ""
    return Line(name, style, path([along("accuracy")], axes), "", band, dots)


def _resource(name: str) -> str:
    """A template or style sheet: of this package under `study/`, else of the run's report."""
    own = name.startswith("study/")
    package = "p2r_jax.study" if own else "p2r_jax.evals"
    folder = importlib.resources.files(package)
    return folder.joinpath(name.removeprefix("study/")).read_text("utf-8")
