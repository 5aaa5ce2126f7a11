"""Phases of a run, found in its metric rows, and where they are on a drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from p2r_jax.evals.chart_axes import Axes

Row = Mapping[str, Any]
"""Of metrics.jsonl: {"step", "phase", "phase_number", "round", ..., "<prefix>/<name>": float}."""

NOT_METRICS = {"step", "phase", "phase_step", "phase_number", "round", "name"}

ROLE_STYLE = {"perceiver": 0, "reasoner": 1, "baseline": 2, "joint": 3}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps in which one role learns."""

    name: str
    number: int | None
    """From 1, over all rounds."""
    round: int | None
    first: int
    last: int
    style: int = 0

    @property
    def label(self) -> str:
        """Example: round 1 perceiver."""
        return self.name if self.round is None else f"round {self.round} {self.name}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Ever shorter ones."""
        if self.round is None:
            return (self.name, self.name[:1].upper())
        return (self.label, self.name, f"{self.name[:1].upper()}{self.round}")


@dataclasses.dataclass(frozen=True)
class Band:
    """A phase on a drawing, pixels. `label` is empty if none fits."""

    style: int
    left: float
    right: float
    label: str


def extent_of(rows: Iterable[Row]) -> tuple[int, int]:
    """First and last step."""
    steps = [int(row["step"]) for row in rows]
    return min(steps), max(steps)


def phases_of(rows: Iterable[Row]) -> list[Phase]:
    """Stretches of steps by `phase_number`, or where that is missing by changes of role or
    round."""
    seen: dict[int, tuple[str, int | None, int | None]] = {}
    for row in rows:
        # A row of evaluation results alone may stand between phases.
        if isinstance(row.get("phase"), str) and not is_evaluation(row):
            numbers = [row.get(key) for key in ("phase_number", "round")]
            number, round_ = (int(n) if is_step(n) else None for n in numbers)
            seen[int(row["step"])] = (row["phase"], number, round_)
    names = list(dict.fromkeys(name for name, _, _ in seen.values()))
    found: list[Phase] = []
    for step in sorted(seen):
        name, number, round_ = seen[step]
        if found and (found[-1].name, found[-1].number, found[-1].round) == seen[step]:
            found[-1] = dataclasses.replace(found[-1], last=step)
        else:
            style = ROLE_STYLE.get(name, names.index(name) % 4)
            found.append(Phase(name, number, round_, step, step, style))
    return found


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """Index of the phase that a step belongs to, the last one for steps beyond."""
    return next((i for i, phase in enumerate(phases) if step <= phase.last), len(phases) - 1)


def is_evaluation(row: Row) -> bool:
    """Whether a row is of an evaluation alone, not of a training step."""
    return row.get("phase") == "eval" or all(
        key.startswith("eval/") for key in row if key not in NOT_METRICS
    )


def is_step(value: Any) -> TypeGuard[float]:
    """Whether a value is a whole number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1


def bands_of(phases: Sequence[Phase], axes: Axes) -> list[Band]:
    """Phases as areas of a drawing."""
    left_end = axes.frame.left
    bands = []
    for i, phase in enumerate(phases):
        left = axes.x(max(axes.first, phase.first - 1)) if i else left_end
        following = phases[i + 1].first - 1 if i + 1 < len(phases) else None
        right = axes.frame.right if following is None else axes.x(following)
        room = (right - left - 6) / 6.3
        label = next((text for text in phase.labels if len(text) <= room), "")
        bands.append(Band(phase.style, left, right, label))
    return bands
